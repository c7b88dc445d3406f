"""Zero-shot classification against open_clip's own classifier and a naive loop, on small towers with random weights."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import tab02_zeroshot
import torch

from vitreg_lib.base import UserError
from vitreg_lib.model import text, zoo
from vitreg_lib.model.text import TEMPLATES, text_tower

CLASSES = ["disc", "square", "star", "ring"]
PROMPTS = (lambda c: f"a photo of a {c}.", lambda c: f"a bad photo of the {c}.", lambda c: f"a {c}.")


@pytest.fixture(scope="module")
def pair():
    """A real CLIP of open_clip's, two layers deep, with random weights."""
    import open_clip

    torch.manual_seed(0)
    vision = dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)
    return open_clip.CLIP(24, vision, text).eval()


@pytest.fixture(scope="module")
def tokenize():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=16)


def test_classes_are_those_of_open_clip(pair, tokenize):
    import open_clip

    wanted = open_clip.build_zero_shot_classifier(pair, tokenize, CLASSES, PROMPTS, 2, "cpu").T
    found = text.class_embeddings(pair.encode_text, tokenize, CLASSES, PROMPTS)
    assert torch.allclose(found, wanted, atol=1e-5), f"gap {(found - wanted).abs().max():.2g}"
    as_text = text.class_embeddings(
        pair.encode_text, tokenize, CLASSES, ("a photo of a {}.", "a bad photo of the {}.", "a {}.")
    )
    assert torch.allclose(as_text, found, atol=1e-6)


def test_answers_are_those_of_a_loop(pair, tokenize):
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = pair.encode_image(pixels)
        texts = {c: [pair.encode_text(tokenize([t(c)]))[0].tolist() for t in PROMPTS] for c in CLASSES}
    unit = lambda v: [x / math.sqrt(sum(y * y for y in v)) for x in v]  # noqa: E731
    means = [unit([sum(column) for column in zip(*map(unit, texts[c]), strict=True)]) for c in CLASSES]
    wanted = []
    for image in images.tolist():
        cosines = [sum(a * b for a, b in zip(unit(image), mean, strict=True)) for mean in means]
        wanted.append(cosines.index(max(cosines)))
    classes = text.class_embeddings(pair.encode_text, tokenize, CLASSES, PROMPTS)
    assert tab02_zeroshot.predict(images, classes).tolist() == wanted
    assert tab02_zeroshot.predict(17 * images, 3 * classes).tolist() == wanted  # lengths do not matter


def test_a_class_at_its_own_prompt_is_found(pair, tokenize):
    classes = text.class_embeddings(pair.encode_text, tokenize, CLASSES, ("a {}",))
    assert tab02_zeroshot.predict(classes, classes).tolist() == [0, 1, 2, 3]


def test_bad_embeddings_are_refused():
    classes = torch.eye(3)
    broken = classes.clone()
    broken[1, 1] = torch.nan
    with pytest.raises(ValueError, match="embeddings of images hold NaN"):
        tab02_zeroshot.predict(broken, classes)
    with pytest.raises(ValueError, match="do not share a space"):
        tab02_zeroshot.predict(torch.ones(2, 4), classes)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A mini image tower with random weights and its text tower, as training ships them, under the name mini-clip."""
    import dataclasses
    import json

    from safetensors.torch import save_file

    from vitreg_lib import base
    from vitreg_lib.model import mini

    torch.manual_seed(0)
    tower = text_tower(32, 1, 24, 24)
    config = json.dumps({"text_width": 32, "text_layers": 1, "embed_dim": 24})
    save_file(tower.state_dict(), tmp_path / "mini-clip.text.safetensors", {"config": config})
    monkeypatch.setattr(base, "CHECKPOINTS", tmp_path)
    module = mini.build("xxs", num_classes=24).eval()
    reference = zoo.load("mini-deit3-xxs", "cpu")
    model = dataclasses.replace(reference, module=module, label="mini-clip", name="mini-clip", entry="mini-clip")
    return SimpleNamespace(model=model, tower=tower.eval())


def test_every_attribute_of_a_scene_is_asked_and_models_without_text_are_left_out(shipped):
    import clip

    from vitreg_lib.data import images
    from vitreg_lib.data.scenes import SHAPES

    other = zoo.load("mini-deit3-xxs", "cpu")
    pictures = images.load("scenes", shipped.model, 20)
    table, hits = tab02_zeroshot.evaluate([shipped.model, other], lambda model: pictures)
    assert list(table.index) == [("mini-clip", q) for q in ("shape", "colour", "texture", "background")]
    assert table.classes.tolist() == [8, 8, 4, 4]
    of_length_one = lambda ids: torch.nn.functional.normalize(shipped.tower(ids), dim=1)  # noqa: E731  as Clip's
    wanted = clip.class_embeddings(of_length_one, "shape")
    encode, tokenize = tab02_zeroshot.text_tower(shipped.model)
    found = text.class_embeddings(encode, tokenize, SHAPES, TEMPLATES["shape"])
    with torch.no_grad():
        assert torch.allclose(found, wanted, atol=1e-5)
        image = torch.nn.functional.normalize(shipped.model.module(pictures.x), dim=1)
    right = (image @ wanted.T).argmax(1) == pictures.scenes.label
    assert torch.equal(hits["mini-clip", "shape"], right)
    assert table.accuracy["mini-clip", "shape"] == pytest.approx(right.double().mean().item())
    with pytest.raises(UserError, match="has no text tower here"):
        tab02_zeroshot.text_tower(other)


def test_photos_need_labels_and_are_asked_in_imagenets_names():
    photos = SimpleNamespace(scenes=None, source="photos")
    with pytest.raises(UserError, match="needs labelled images"):
        tab02_zeroshot.questions(photos)
    (question,) = tab02_zeroshot.questions(photos, torch.tensor([0, 999]))
    assert len(question.classes) == 1000 and question.classes[0] == "tench" and len(question.templates) == 80
