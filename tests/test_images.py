"""Images reach a model as timm would prepare them, the same for every model, and damaged ones are named."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from vitreg_lib.base import UserError
from vitreg_lib.data import images, scenes, textures
from vitreg_lib.model import zoo
from vitreg_lib.model.model import Model
from vitreg_lib.model.outside import of_module
from vitreg_lib.train import loop, state


def any_model(**options) -> Model:
    return Model("any", torch.nn.Identity(), "", **{"input_size": 64} | options)


@pytest.fixture
def folder(tmp_path):
    """Six small pictures, two of them one folder down."""
    noise = np.random.default_rng(0)
    for i, name in enumerate(["a.png", "b.jpg", "c.JPEG", "d.bmp", "sub/e.webp", "sub/f.tiff"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise.integers(0, 255, (50 + i, 70, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "deit_tiny_patch16_224.fb_in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_base_patch16_clip_224.laion2b",
        "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",  # crop_mode "squash"
        "beit_base_patch16_224.in22k_ft_in22k_in1k",
    ],
)
def test_preprocessing_equals_timms_own(name):
    module = timm.create_model(name, depth=1, embed_dim=48, num_heads=1)
    config = resolve_model_data_config(module)
    model = of_module(module, name)
    photo = Image.open(images.find("photos")[0][1]).convert("RGB")
    assert photo.width != photo.height
    pixels = images.preprocessing(model, model.input_size)(photo)[None]
    expected = create_transform(**config, is_training=False)(photo)
    assert model.input_size == config["input_size"][-1]
    torch.testing.assert_close(model.normalise(pixels)[0], expected, atol=1e-5, rtol=0)


def test_a_part_of_a_set_keeps_what_belongs_to_its_images():
    model = zoo.load("mini-random", "cpu")
    drawn, photos = (images.load(source, model, 4) for source in ("scenes", "photos"))
    part = drawn.at([3, 1])
    assert part.names == [drawn.names[3], drawn.names[1]] and torch.equal(part.pixels, drawn.pixels[[3, 1]])
    assert torch.equal(part.x, drawn.x[[3, 1]]) and part.paths == [] and len(drawn) == 4
    assert torch.equal(images.labels(part), drawn.scenes.label[[3, 1]])
    assert photos.at(range(2, 4)).paths == photos.paths[2:] and photos.at([0]).scenes is None


def test_photos_that_ship_with_the_packages_are_there():
    loaded = images.load("photos", any_model(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)), 100)
    assert len(loaded) == len(loaded.names) == 10
    assert "photos shipped with scikit-image and scikit-learn, 10 of 10 images" in loaded.source
    assert loaded.x.shape == (10, 3, 64, 64)
    assert 0 <= loaded.pixels.min() < loaded.pixels.max() <= 1
    assert loaded.scenes is None
    expected = (loaded.pixels - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1, 2, 4])[:, None, None]
    torch.testing.assert_close(loaded.x, expected)


def test_scenes_come_with_their_truth_and_are_held_out():
    loaded = images.load("scenes", any_model(), 3, seed=2)
    assert torch.equal(loaded.scenes.pixels, loaded.pixels)
    assert (loaded.scenes.index >= scenes.HELD_OUT).all()
    again = images.load("scenes", any_model(), 2, seed=2)
    assert torch.equal(again.pixels, loaded.pixels[:2])
    other = images.load("scenes", any_model(), 3, seed=3)
    assert not set(other.scenes.index.tolist()) & set(loaded.scenes.index.tolist())


def test_a_model_too_small_for_scenes_is_refused_in_one_line():
    with pytest.raises(
        UserError, match="scenes have 64 to 224 pixels a side, this model wants 12; try images textures"
    ):
        images.load("scenes", any_model(input_size=12), 2)


def test_textures_are_what_the_task_holds_out(tmp_path):
    """As the model was trained to see them, not normalised; another seed has others; another size is refused."""
    config, recipe = loop.configure("emergence")
    state.save_weights(tmp_path / "tiny.safetensors", recipe.build(config), {})
    model = zoo.load(f"file:{tmp_path / 'tiny.safetensors'}")
    found = images.load("textures", model, 4)
    assert found.x.shape == (4, 3, 12, 12)
    assert torch.equal(found.x, recipe.held_out(config, 64, part=textures.TO_LOOK_AT).pixels[:4])
    assert torch.equal(found.x[:2], images.load("textures", model, 2).x)
    assert not torch.equal(found.x, images.load("textures", model, 4, seed=1).x)
    assert (found.pixels.min() >= 0) & (found.pixels.max() <= 1)
    with pytest.raises(UserError, match="textures have 12 pixels a side, this model wants 96; try mini-corners"):
        images.load("textures", zoo.load("mini-random"), 2)


def test_a_folder_is_searched_below_and_drawn_from_by_seed(folder):
    everything = images.load(str(folder), any_model(), 100)
    assert everything.names == ["a", "b", "c", "d", "e", "f"]
    one = images.load(str(folder), any_model(), 3, seed=1)
    again = images.load(str(folder), any_model(input_size=32, crop=0.9), 3, seed=1)
    assert one.names == again.names  # the same for every model
    assert again.x.shape == (3, 3, 32, 32)
    draws = {tuple(images.load(str(folder), any_model(input_size=8), 3, seed=seed).names) for seed in range(6)}
    assert len(draws) > 1
    assert one.source == f"{folder.name}, 3 of 6 images"


@pytest.mark.parametrize("damage", ["truncated", "no picture", "empty"])
def test_a_damaged_image_is_named_and_left_out(folder, damage):
    whole = (folder / "b.jpg").read_bytes()
    (folder / "b.jpg").write_bytes(
        {"truncated": whole[: len(whole) // 3], "no picture": b"hello", "empty": b""}[damage]
    )
    with pytest.warns(UserWarning, match="b.jpg cannot be read and is left out"):
        loaded = images.load(str(folder), any_model(), 100)
    assert loaded.names == ["a", "c", "d", "e", "f"]
    assert len(loaded.x) == 5


def test_a_folder_of_damaged_images_alone_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.warns(UserWarning, match="a.png"), pytest.raises(UserError, match="none of the 1 images in"):
        images.load(str(tmp_path), any_model(), 3)


@pytest.fixture
def grey():
    """Every grey value from 0 to 255 once."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(path, values, **options) -> np.ndarray:
    """What `images.read` gives for an array or a PIL image that is saved first."""
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(path, **options)
    picture = images.read(path)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("factor", [256, 257])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_a_picture_of_16_bits_equals_its_twin_of_8(tmp_path, grey, suffix, factor):
    deep = grey.astype(np.uint16) * factor
    assert np.array_equal(saved(tmp_path / f"deep.{suffix}", deep), saved(tmp_path / "flat.png", grey))


def test_pictures_of_32_bits_and_floating_point_equal_their_twins(tmp_path, grey):
    wanted = saved(tmp_path / "flat.png", grey)
    twins = {
        "8 bits in 32": grey.astype(np.int32),
        "16 bits in 32": grey.astype(np.int32) * 257,
        "31 bits": (grey.astype(np.int64) * (2**31 - 1) // 255).astype(np.int32),
        "0 to 1": grey.astype(np.float32) / 255,
        "0 to 255": grey.astype(np.float32),
        "0 to 65535": grey.astype(np.float32) * 257,
    }
    for name, values in twins.items():
        gap = np.abs(saved(tmp_path / "twin.tiff", values).astype(int) - wanted).max()
        assert gap <= (name == "31 bits"), f"{name}: {gap} of 255 apart"


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_grey_values_without_a_meaning_are_refused(tmp_path, bad):
    Image.fromarray(np.full((4, 4), bad, np.float32)).save(tmp_path / "bad.tiff")
    with pytest.raises(UserError, match="its grey values go from"):
        images.read(tmp_path / "bad.tiff")


def test_pictures_stand_upright(tmp_path):
    """Each of EXIF's eight orientations shows the same scene: red above left, and it is wider than high."""
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20, 0] = 255
    stored = {  # how a camera lays the pixels down for each orientation
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, 3),
    }  # fmt: skip
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        assert np.array_equal(saved(tmp_path / "a.png", np.ascontiguousarray(pixels), exif=exif), upright), orientation


def test_colours_and_transparency(tmp_path):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for name, picture in {
        "palette.png": red.quantize(4), "palette.gif": red.quantize(4), "print.tif": red.convert("CMYK"),
        "grey.png": Image.new("L", (8, 8), 76), "bits.png": Image.new("1", (8, 8), 1),
    }.items():  # fmt: skip
        wanted = {"grey.png": (76, 76, 76), "bits.png": (255, 255, 255)}.get(name, (255, 0, 0))
        assert (saved(tmp_path / name, picture) == wanted).all(), name
    printed = saved(tmp_path / "print.jpg", red.convert("CMYK")).astype(int)
    assert np.abs(printed - (255, 0, 0)).max() <= 3  # JPEG
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    half.paste((0, 0, 0, 0), (0, 0, 4, 8))
    seen = saved(tmp_path / "clear.png", half)
    assert (seen[:, :4] == 255).all(), "what is clear lies on white, whatever its hidden colour"
    assert np.abs(seen[0, -1].astype(int) - (255, 127, 127)).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert (np.asarray(images.read(tmp_path / f"a.{suffix}")) == 255).all()


def test_a_folder_of_all_kinds_goes_on_without_the_bad_ones(tmp_path, monkeypatch):
    """Corrupt, empty and huge files are listed with the reason; the others are read."""
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tiff"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"good.{suffix}")
        whole = (tmp_path / f"good.{suffix}").read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        (tmp_path / f"flipped.{suffix}").write_bytes(bytes(255 - b for b in whole[:60]) + whole[60:])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("L", (101, 100)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.warns(UserWarning, match="cannot be read and is left out"):
        found = images.load(str(tmp_path), any_model(input_size=8), 100)
    left_out = {p.name for p in tmp_path.iterdir() if p.stem != "good"}
    assert set(found.left_out) <= left_out and {"empty.png", "text.jpg", "huge.png", "cut.jpg"} <= set(found.left_out)
    assert len(found) + len(found.left_out) == len(list(tmp_path.iterdir())) and found.names.count("good") == 6
    assert "exceeds limit of 10000 pixels" in found.left_out["huge.png"] and all(found.left_out.values())


def test_heic_is_read_where_pillow_can(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(tmp_path / "a.heic")
    assert np.abs(np.asarray(images.read(tmp_path / "a.heic")).astype(int) - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("source", ["scenes", "photos"])
def test_a_stream_gives_what_load_gives(source):
    whole = images.load(source, any_model(), 7, seed=3)
    parts = list(images.stream(source, any_model(), 7, seed=3, batch_size=3))
    assert [len(p) for p in parts] == [3, 3, 1] and [n for p in parts for n in p.names] == whole.names
    assert torch.equal(torch.cat([p.x for p in parts]), whole.x)


def test_a_stream_of_textures_gives_what_load_gives():
    model = any_model(input_size=12)
    parts = list(images.stream("textures", model, 150, batch_size=50))
    assert torch.equal(torch.cat([p.x for p in parts]), images.load("textures", model, 150).x)


def test_a_stream_holds_one_batch_and_passes_over_bad_files(folder):
    """A batch without any readable picture is passed over; a batch is freed before the next but one is made."""
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"hello")
    batches, names, kept = images.stream(str(folder), any_model(), 100, batch_size=2), [], []
    with pytest.warns(UserWarning, match="left out"):
        for batch in batches:
            kept = [ref for ref in kept if ref() is not None] + [weakref.ref(batch.x)]
            assert len(kept) <= 2
            names += batch.names
            left_out = batch.left_out
    assert names == ["c", "d", "e", "f"] and set(left_out) == {"a.png", "b.jpg"}


@pytest.mark.parametrize("source", ["scenes", "folder"])
def test_a_stream_goes_on_after_the_first_images(source, folder):
    source = str(folder) if source == "folder" else source
    whole, first = (set(images.load(source, any_model(), n, seed=3).names) for n in (5, 3))
    rest = [name for part in images.stream(source, any_model(), 5, seed=3, first=3) for name in part.names]
    assert len(rest) == 2 and set(rest) | first == whole


def test_labels_are_those_of_the_file_or_of_the_folders(tmp_path):
    for name in ("cat/1.png", "ant/2.png", "bee/3.png", "bee/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = images.load(str(tmp_path), any_model(), 3)
    assert images.labels(found) is None
    order = {"ant": 0, "bee": 1, "cat": 2}
    assert images.labels(found, folders=True).tolist() == [order[path.parent.name] for path in found.paths]
    assert images.labels_fit(found, 3) and not images.labels_fit(found, 1000)
    (tmp_path / "labels.csv").write_text("file,class_index\n1.png,7\n2.png,8\n3.png,9\n4.png,9\n")
    known = {"1": 7, "2": 8, "3": 9, "4": 9}
    assert images.labels(found).tolist() == [known[name] for name in found.names]
    assert images.labels_fit(found, 1000)


def test_an_empty_folder_and_a_missing_one_are_refused(tmp_path, no_models):
    with pytest.raises(UserError, match="holds no images"):
        images.load(str(tmp_path), any_model(), 1)
    with pytest.raises(
        UserError,
        match="no images at 'nowhere': write scenes, stamps, textures, photos, or the path of an image",
    ):
        images.load("nowhere", any_model(), 1)
    with pytest.raises(UserError, match="VITREG_DATA"):
        images.load("imagenet", any_model(), 1)


def test_a_data_set_by_name_is_looked_up_in_vitreg_data_first(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("models")
    (other / "data" / "imagenet").mkdir(parents=True)
    monkeypatch.setenv("VITREG_MODELS", str(other))
    monkeypatch.delenv("VITREG_DATA", raising=False)
    assert images.named_folder("imagenet") == other / "data" / "imagenet"
    monkeypatch.setenv("VITREG_DATA", str(folder))
    assert images.named_folder("sub") == folder / "sub"
    assert images.named_folder("imagenet") == other / "data" / "imagenet"
    assert images.load("sub", any_model(), 9).names == ["e", "f"]


def test_classes_of_files_with_one_name_in_two_folders(tmp_path):
    rows = ["file,class_index"]
    for label, folder in enumerate(("cat", "dog")):
        (tmp_path / folder).mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{i}.png")
            rows.append(f"{folder}/{i}.png,{label}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert images.labels(images.load(str(tmp_path), any_model(input_size=16), 4)).tolist() == [0, 0, 1, 1]
    (tmp_path / "labels.csv").write_text("file,class_index\n0.png,3\n1.png,4")  # without folders: by the name alone
    assert images.labels(images.load(str(tmp_path), any_model(input_size=16), 4)).tolist() == [3, 4, 3, 4]


def test_a_data_set_with_boxes_and_masks_gives_its_photos_alone(tmp_path, monkeypatch):
    for part in ("images", "masks"):
        (tmp_path / "coco" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "coco" / part / f"{part}.png")
    monkeypatch.setenv("VITREG_DATA", str(tmp_path))
    taken = images.load("coco", any_model(), 9)
    assert taken.names == ["images"] and taken.source == "coco, 1 of 1 images"
