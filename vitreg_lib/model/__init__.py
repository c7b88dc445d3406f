"""The mini ViTs, the zoo that turns a name into a model, and the controls."""
