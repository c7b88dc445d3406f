"""Images to measure on: the procedural `scenes`, the shipped `photos`, and folders of the user's own."""
