"""Data sets in the layouts they are published in: tiny copies that the test writes, each in its true format."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import tab02_sets
import tables_sets
import torch
from PIL import Image

from vitreg_lib.base import UserError
from vitreg_lib.data import formats, sets
from vitreg_lib.data.sets import load_boxes
from vitreg_lib.model import mini
from vitreg_lib.model.model import Model


@pytest.fixture(scope="module")
def model():
    module = mini.build("xxs").eval().requires_grad_(False)
    return Model("random-mini", module, "0" * 64, input_size=96, crop=0.9, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder that VITREG_DATA names."""
    monkeypatch.setenv("VITREG_DATA", str(tmp_path))
    monkeypatch.delenv("VITREG_MODELS", raising=False)
    return tmp_path


def photo(path, colour=(200, 30, 30), size=(40, 30)):
    """A picture of one colour, by which a test can tell which file was read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def red(part, row) -> int:
    return part.data[row]["image"].convert("RGB").getpixel((5, 5))[0]


def test_every_entry_says_what_a_user_needs():
    tables = {e["paper"] for e in sets.entries().values() if "paper" in e}
    wanted = "IN1k P205 Airc. CF10 CF100 CUB Cal101 Cars DTD Flow. Food Pets SUN VOC".split()
    assert set(wanted) <= tables and {"Table 2a", "Table 3"} <= tables
    for name, entry in sets.entries().items():
        assert {"title", "task", "metric", "licence", "citation", "folder"} <= set(entry), name
        assert entry["folder"]["layout"] in tables_sets.LAYOUTS, name
        assert "hub" in entry or "get" in entry or "small" in entry, name
        assert sets.how(name)


def test_imagefolder(data):
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee")):
            for i in range(3):
                photo(data / "cifar10" / split / name / f"{i}.png", (60 * number + 10 * i, 0, 0))
    part = tables_sets.load("cifar10", "test")
    assert part.data.features["label"].names == ["ant", "bee"]
    assert part.data["label"][:] == [0, 0, 0, 1, 1, 1]
    assert [red(part, i) for i in range(6)] == [0, 10, 20, 60, 70, 80]
    assert part.title == "CIFAR-10, 2 of 10 classes, test 6 images"


def test_a_drawn_split_of_caltech_is_whole_and_disjoint(data):
    for name in ("BACKGROUND_Google", "ant", "bee"):
        for i in range(34):
            photo(data / "caltech101" / "101_ObjectCategories" / name / f"image_{i:04d}.jpg", (i, 0, 0))
    parts = [tables_sets.load("caltech101", split) for split in ("train", "test")]
    assert [len(p) for p in parts] == [60, 8]
    files = [{r["image"]["path"] for r in p.data.cast_column("image", formats_image()).to_list()} for p in parts]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 68


def formats_image():
    from datasets import Image as ImageFeature

    return ImageFeature(decode=False)


def test_lists_of_files_are_read_as_torchvision_reads_them(data):
    from torchvision import datasets as tv

    base = data / "dtd"  # Describable Textures
    parts = {"train": ["a/a_1.jpg", "b/b_1.jpg"], "val": ["b/b_2.jpg"], "test": ["b/b_3.jpg", "a/a_9.jpg"]}
    (base / "labels").mkdir(parents=True)
    for split, names in parts.items():
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
        for name in names:
            photo(base / "images" / name)
    assert tables_sets.load("dtd").data["label"][:] == [0, 1, 1]
    (data / "tv" / "dtd").mkdir(parents=True)
    (data / "tv" / "dtd" / "dtd").symlink_to(base)
    theirs = tv.DTD(str(data / "tv"), split="test")
    assert [label for _, label in theirs] == tables_sets.load("dtd", "test").data["label"][:] == [1, 0]

    base = data / "aircraft"
    lines = {"train": ["1 707-320", "2 Cessna 172"], "val": ["3 707-320"], "test": ["4 Cessna 172", "5 707-320"]}
    for split, rows in lines.items():
        for row in rows:
            photo(base / "data" / "images" / f"{row.split()[0]}.jpg")
        (base / "data" / f"images_variant_{split}.txt").write_text("\n".join(rows))
    part = tables_sets.load("aircraft", "test")
    assert part.data["label"][:] == [1, 0] and part.data.features["label"].names == ["707-320", "Cessna 172"]
    assert tables_sets.load("aircraft").data["label"][:] == [0, 1, 0]

    base = data / "pets"  # breeds numbered from 1; the second word is the class
    (base / "annotations").mkdir(parents=True)
    for name in ("Abyssinian_1", "beagle_1", "beagle_2", "Abyssinian_2"):
        photo(base / "images" / f"{name}.jpg")
    (base / "annotations" / "trainval.txt").write_text("Abyssinian_1 1 1 1\nbeagle_1 10 2 1\n")
    (base / "annotations" / "test.txt").write_text("beagle_2 10 2 1\nAbyssinian_2 1 1 1\n")
    assert tables_sets.load("pets", "test").data["label"][:] == [1, 0]
    (base / "annotations" / "test.txt").write_text("beagle_2 11 2 1\n")
    with pytest.raises(UserError, match="has the class '11', which annotations/trainval.txt lacks"):
        tables_sets.load("pets", "test")


def test_sun_and_places_and_food(data):
    for name, path, lines in (
        ("sun397", "SUN397/a/abbey/sun_{}.jpg", "/a/abbey/sun_{}.jpg"),
        ("food", "images/pie/{}.jpg", "pie/{}"),
    ):
        other = {"sun397": "SUN397/b/beach/sun_0.jpg", "food": "images/bun/0.jpg"}[name]
        listed = {"sun397": "/b/beach/sun_0.jpg", "food": "bun/0"}[name]
        files = {"sun397": ("Training_01.txt", "Testing_01.txt"), "food": ("meta/train.txt", "meta/test.txt")}[name]
        (data / name / "meta").mkdir(parents=True)
        photo(data / name / other)
        for number, file in enumerate(files):
            photo(data / name / path.format(number))
            (data / name / file).write_text(f"{lines.format(number)}\n{listed}\n")
        labels = tables_sets.load(name, "test").data["label"][:]
        assert labels == ([0, 1] if name == "sun397" else [1, 0]), name
    base = data / "places205"
    (base / "trainvalsplit_places205").mkdir(parents=True)
    for part in ("train", "val"):
        (base / "trainvalsplit_places205" / f"{part}_places205.csv").write_text("a/abbey/x.jpg 0\nb/bar/y.jpg 11\n")
    for file in ("a/abbey/x.jpg", "b/bar/y.jpg"):
        photo(base / "data/vision/torralba/deeplearning/images256" / file)
    part = tables_sets.load("places205", "test")
    assert part.data["label"][:] == [0, 1] and part.data.features["label"].names == ["0", "11"]


def test_birds_cars_and_flowers(data):
    from scipy.io import savemat

    base = data / "cub"
    for name, rows in {
        "images": ["1 001.A/a.jpg", "2 002.B/b.jpg", "3 002.B/c.jpg", "4 001.A/d.jpg"],
        "image_class_labels": ["1 1", "2 2", "3 2", "4 1"],
        "train_test_split": ["1 1", "2 1", "3 0", "4 0"],
        "classes": ["1 001.A", "2 002.B"],
    }.items():
        base.mkdir(exist_ok=True)
        (base / f"{name}.txt").write_text("\n".join(rows))
    for row in ("001.A/a.jpg", "002.B/b.jpg", "002.B/c.jpg", "001.A/d.jpg"):
        photo(base / "images" / row)
    assert tables_sets.load("cub", "test").data["label"][:] == [1, 0]
    assert tables_sets.load("cub").data.features["label"].names == ["001.A", "002.B"]

    base = data / "cars"
    (base / "devkit").mkdir(parents=True)
    rows = np.array([(2, "1.jpg"), (1, "2.jpg")], dtype=[("class", object), ("fname", object)])
    savemat(base / "devkit" / "cars_train_annos.mat", {"annotations": rows})
    for i in (1, 2):
        photo(base / "cars_train" / f"{i}.jpg")
    assert tables_sets.load("cars").data["label"][:] == [1, 0]
    with pytest.raises(
        UserError, match="no file cars_test_annos_withlabels.mat in cars, which holds cars_train, devkit"
    ):
        tables_sets.load("cars", "test")

    base = data / "flowers"
    for i in range(1, 5):
        photo(base / "jpg" / f"image_{i:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[2, 1, 1, 2]])})
    savemat(base / "setid.mat", {"trnid": [[1]], "valid": [[2]], "tstid": [[3, 4]]})
    assert tables_sets.load("flowers").data["label"][:] == [1, 0]
    assert tables_sets.load("flowers", "test").data["label"][:] == [0, 1]


XML = """<annotation><filename>{}.jpg</filename><size><width>100</width><height>50</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>60</xmax><ymax>30</ymax>
</bndbox></object><object><name>person</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>
<xmax>100</xmax><ymax>50</ymax></bndbox></object></annotation>"""


def test_voc(data, model):
    base = data / "voc2007" / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    (base / "ImageSets/Main/trainval.txt").write_text("000005\n000007\n")
    for name in ("000005", "000007"):
        photo(base / "JPEGImages" / f"{name}.jpg", size=(100, 50))
    (base / "Annotations/000005.xml").write_text(XML.format("000005"))
    (base / "Annotations/000007.xml").write_text("<annotation></annotation>")
    part = tables_sets.load("voc2007")
    assert sum(part.data[0]["labels"]) == 2 and part.data[0]["labels"][formats.VOC_CLASSES.index("dog")] == 1
    assert part.data[0]["difficult"] == [0, 1]
    pictures, boxes = load_boxes("voc2007", model)  # squashed from 100 x 50 to 96 x 96
    torch.testing.assert_close(boxes[0][0], torch.tensor([9.6, 9.6, 57.6, 57.6]))
    torch.testing.assert_close(boxes[0][1], torch.tensor([0.0, 0.0, 96.0, 96.0]))
    assert "1 with boxes, 1 without left out" in pictures.source and len(pictures) == 1
    (base / "Annotations/000007.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match="Annotations/000007.xml in VOC2007 is no annotation of VOC"):
        tables_sets.load("voc2007")
    (base / "Annotations/000007.xml").unlink()
    with pytest.raises(UserError, match="no file Annotations/000007.xml in VOC2007"):
        tables_sets.load("voc2007")


def test_coco(data, model):
    base = data / "coco20k"
    (base / "annotations").mkdir(parents=True)
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(3)]
    for name in names:
        photo(base / "train2014" / name, size=(100, 50))
    table = {
        "images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [
            {"image_id": 0, "bbox": [10, 5, 50, 25], "category_id": 18, "iscrowd": 0},
            {"image_id": 1, "bbox": [0, 0, 9, 9], "category_id": 18, "iscrowd": 1},
            {"image_id": 2, "bbox": [0, 0, 9, 9], "category_id": 18, "iscrowd": 0},
        ],
    }
    (base / "annotations/instances_train2014.json").write_text(json.dumps(table))
    (base / "coco_20k_filenames.txt").write_text("".join(f"train2014/{n}\n" for n in names[:2]))
    part = tables_sets.load("coco20k")
    assert len(part) == 2 and part.data[0]["objects"] == ["dog"] and part.data[1]["boxes"] == []
    pictures, boxes = load_boxes("coco20k", model)
    torch.testing.assert_close(boxes[0], torch.tensor([[9.6, 9.6, 57.6, 57.6]]))
    (base / "annotations/instances_train2014.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="no annotation file of COCO .images, annotations, categories."):
        tables_sets.load("coco20k")


def test_masks_of_ade20k(data, model):
    base = data / "ade20k"
    for part in ("training", "validation"):
        photo(base / "images" / part / "ADE_1.jpg", size=(60, 40))
        mask = np.zeros((40, 60), np.uint8)
        mask[:, 30:] = 150
        mask[20:] = 1
        (base / "annotations" / part).mkdir(parents=True)
        Image.fromarray(mask).save(base / "annotations" / part / "ADE_1.png")
    pictures, masks, classes = tab02_sets.segmentation("ade20k", "test", model)
    assert classes == 150 and masks.shape == (1, 96, 96) == (1, *pictures.x.shape[-2:])
    assert masks[0, 0, 0] == tab02_sets.IGNORE and masks[0, 0, -1] == 149 and masks[0, -1, -1] == 0
    (base / "annotations/validation/ADE_1.png").unlink()
    with pytest.raises(UserError, match="validation/ADE_1.png is missing in ade20k .1 of 1 files.: expected"):
        tables_sets.load("ade20k", "test")


def test_depth_of_nyu(data, model):
    base = data / "nyud" / "sync" / "bathroom_0001"
    photo(base / "rgb_00000.jpg", size=(60, 40))
    depth = np.full((40, 60), 2500, np.uint16)
    depth[0] = 0
    Image.fromarray(depth).save(base / "sync_depth_00000.png")
    _, depths, largest = tab02_sets.depth("nyud", "train", model)
    assert largest == 10 and depths[0, -1, 0] == 2.5 and depths[0, 0, 0] == 0
    (base / "sync_depth_00000.png").unlink()
    with pytest.raises(UserError, match="sync_depth_00000.png is missing in nyud .*: expected SCENE/rgb_N.jpg"):
        tables_sets.load("nyud")


def test_parquet_with_the_hubs_features(data):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    pictures = [Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(4)]
    features = Features(
        {"img": ImageFeature(), "fine_label": ClassLabel(names=["x", "y"]), "coarse_label": ClassLabel(1)}
    )
    rows = {"img": pictures, "fine_label": [1, 0, 1, 0], "coarse_label": [0] * 4}
    (data / "cifar100" / "data").mkdir(parents=True)
    Dataset.from_dict(rows, features=features).to_parquet(data / "cifar100/data/test-00000-of-00001.parquet")
    part = tables_sets.load("cifar100", "test")
    assert part.data.column_names == ["image", "label"] and part.data.features["label"].names == ["x", "y"]
    assert [red(part, i) for i in range(4)] == [0, 10, 20, 30]
    with pytest.raises(UserError, match="no folder train/ in cifar100"):
        tables_sets.load("cifar100", "train")


def test_wrong_layouts_say_what_was_expected_where(data):
    photo(data / "cifar10" / "pictures" / "a.png")
    with pytest.raises(
        UserError, match=r"no folder train/ in cifar10: expected SPLIT/CLASS/photo.jpg \(there is pictures"
    ):
        tables_sets.load("cifar10")
    photo(data / "cifar10" / "train" / "ant" / "a.png")
    with pytest.raises(UserError, match="cifar10 has one class only .ant."):
        tables_sets.load("cifar10")
    (data / "cifar10" / "train" / "bee").mkdir()
    with pytest.raises(UserError, match="class folder train/bee in cifar10 holds no image"):
        tables_sets.load("cifar10")
    with pytest.raises(UserError, match="camvid-small .* is not here"):
        tables_sets.load("camvid-small")
    with pytest.raises(UserError, match="unknown data set 'cifar11': did you mean cifar10"):
        tables_sets.load("cifar11")
    with pytest.raises(UserError, match="unknown split 'val'"):
        tables_sets.load("cifar10", "val")
    (data / "dtd" / "labels").mkdir(parents=True)
    (data / "dtd" / "labels" / "train1.txt").write_text("a/1.jpg\nb/1.jpg\n")
    (data / "dtd" / "labels" / "val1.txt").write_text("")
    with pytest.raises(UserError, match=r"images/a/1.jpg is missing in dtd \(2 of 2 files\)"):
        tables_sets.load("dtd")


def test_a_damaged_picture_is_left_out_with_its_mask_and_its_boxes(data, model):
    for i, name in enumerate("abc"):
        photo(data / "camvid-small/train" / f"{name}.png", (100, 100, 100))
        (data / "camvid-small/train_labels").mkdir(exist_ok=True)
        Image.fromarray(np.full((30, 40), i, np.uint8)).save(data / "camvid-small/train_labels" / f"{name}.png")
        (data / "coco-small/boxes").mkdir(parents=True, exist_ok=True)
        photo(data / "coco-small/images" / f"{name}.png")
        (data / "coco-small/boxes" / f"{name}.txt").write_text(f"0 0.5 0.5 0.{i + 2} 0.5")
    for folder in ("camvid-small/train", "coco-small/images"):
        (data / folder / "b.png").write_bytes(b"hello")
    with pytest.warns(UserWarning, match="b of camvid-small cannot be read and is left out"):
        pictures, masks, _ = tab02_sets.segmentation("camvid-small", "train", model)
    assert pictures.names == ["a", "c"] and set(pictures.left_out) == {"b"}
    assert [mask.unique().tolist() for mask in masks] == [[0], [2]]
    with pytest.warns(UserWarning, match="b of coco-small cannot be read"):
        pictures, boxes = load_boxes("coco-small", model)
    assert pictures.names == ["a", "c"]
    assert [round((b[0, 2] - b[0, 0]).item(), 3) for b in boxes] == [19.2, 38.4]


def test_without_network_a_hub_set_says_where_a_copy_may_lie(data):
    with pytest.raises(
        UserError, match="food .* cannot be had from the hub .*: by itself from the hub .ethz/food101., or a"
    ):
        tables_sets.load("food")


def test_scenes_as_dense_sets_share_no_image_between_splits(model):
    for load, column in ((tab02_sets.segmentation, "semantic"), (tab02_sets.depth, "depth")):
        (train, y, top), (test, _, _) = (load("scenes", split, model, 3) for split in ("train", "test"))
        assert not set(train.scenes.index.tolist()) & set(test.scenes.index.tolist())
        assert torch.equal(y, getattr(train.scenes, column)) and y.max() <= top


def test_small_parts_are_found_and_named_for_what_they_are(real, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = tables_sets.load("caltech101-small", "test")
        assert part.title == "Caltech-101, 20 of its classes, test 320 images"
        assert len(tables_sets.load("cifar10-small")) == 800
        assert len(tables_sets.load("imagenet-small")) == 100
        _, masks, classes = tab02_sets.segmentation("camvid-small", "test", model, 3)
        assert classes == 11 and set(masks.unique().tolist()) <= {*range(11), tab02_sets.IGNORE}
        pictures, boxes = load_boxes("coco-small", model, 5)
        assert len(boxes) == len(pictures) == 5
    with pytest.raises(UserError, match="coco-small has no mask .its task is boxes.: use one of ade20k, camvid-small"):
        tab02_sets.segmentation("coco-small", "train", model)
    assert sets.state("caltech101") == "not here"  # the small part is not taken for the whole
