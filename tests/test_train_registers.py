"""Registers trained into a model: how it grows, what teaches it, what comes out, and the remedies beside it."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import registers_after_training as experiment
import registers_drawn as drawn
import registers_live as live
import timm
import torch
from torch import nn

from vitreg_lib import cli
from vitreg_lib.base import ROOT, UserError
from vitreg_lib.data import images
from vitreg_lib.hooks.capture import capture
from vitreg_lib.measure import pairs
from vitreg_lib.model import added, mend, mini, names, planted, remedies, saved, zoo
from vitreg_lib.model.grow import with_registers
from vitreg_lib.model.model import Model
from vitreg_lib.train import loop, state
from vitreg_lib.train.recipes import registers as recipe

sys.path.insert(0, str(ROOT / "workflow"))
import twins  # noqa: E402

VIT, EVA = "random:vit_tiny_patch16_224", "random:eva02_tiny_patch14_224"
SIZES = {VIT: 64, EVA: 56}
CUTOFFS = {}


def cutoff_of(name: str, source: str = "photos") -> float:
    """A norm that one token in fifty of a random model exceeds: something to call outliers where there are none."""
    if (name, source) not in CUTOFFS:
        model = zoo.load(name, "cpu", SIZES[name])
        norms = model.capture(images.load(source, model, 10), layers=-1).patch_norms
        CUTOFFS[name, source] = norms.flatten().quantile(0.98).item()
    return CUTOFFS[name, source]


def configured(name: str, **options):
    cutoff = cutoff_of(name, options.get("data") or "photos")
    small = dict(model=name, image_size=SIZES[name], cutoff=cutoff, teacher="shift", steps=3, batch_size=4)
    return loop.configure("registers", **{**small, "registers": 2, "workers": 0, "warmup": 1, **options})[0]


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 small photos: noise around a colour."""
    from PIL import Image

    folder, generator = tmp_path / "photos", torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(30):
        colour = 255 * torch.rand(1, 1, 3, generator=generator)
        pixels = (colour + 30 * torch.randn(80, 96, 3, generator=generator)).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02}.png")
    return folder


class TestGrown:
    @pytest.mark.parametrize(
        "name",
        ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224", "eva02_tiny_patch14_224"],
    )
    def test_registers_of_zeros_are_empty_tokens(self, name):
        """With and without places for prefix tokens, with a norm before the blocks, with rotary embeddings."""
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=56 if "14" in name else 64, num_classes=7, depth=2).eval()
        model.timm_config = {"model_args": {"depth": 2}}
        if "clip" in name:  # its norm before the blocks turns a token of zeros into its bias
            nn.init.zeros_(model.norm_pre.bias)
        x = torch.randn(2, 3, *model.patch_embed.img_size)
        grown = with_registers(model, torch.zeros(3, model.embed_dim))
        torch.testing.assert_close(grown(x), added.add_registers(model, (), 3)(x), rtol=1e-4, atol=1e-5)
        assert grown.num_prefix_tokens == 4 and not torch.equal(grown(x), model(x))

    def test_more_registers_stand_behind_those_that_are_there(self):
        model = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=1).eval()
        model.timm_config = {"model_args": {"depth": 1}}
        nn.init.normal_(model.reg_token)
        grown = with_registers(model, torch.ones(2, 384))
        assert torch.equal(grown.reg_token[0, :4], model.reg_token[0]) and (grown.reg_token[0, 4:] == 1).all()

    def test_an_architecture_without_registers_is_refused(self):
        beit = timm.create_model("beit_base_patch16_224", img_size=64, depth=1, embed_dim=96, num_heads=3)
        with pytest.raises(UserError, match="no registers for Beit"):
            with_registers(beit, torch.zeros(1, 96))


class PatchColours(nn.Module):
    """A 'ViT' whose tokens after the last block are the mean colours of the patches."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.AvgPool2d(4)
        self.patch_embed.patch_size = (4, 4)
        block = nn.Identity()
        block.attn, block.mlp = nn.Identity(), nn.Identity()
        block.attn.num_heads = 1
        self.blocks, self.norm = nn.Sequential(block), nn.Identity()
        self.num_prefix_tokens, self.embed_dim = 0, 3

    def forward(self, x):
        return self.blocks(self.patch_embed(x).flatten(2).transpose(1, 2)).mean(1)


class TestTeachers:
    def test_views_are_moved_back_to_where_they_belong(self):
        """Where a token says what its patch shows and nothing else, the mean over views is each token itself."""
        torch.manual_seed(0)
        x = torch.rand(2, 3, 6, 5).repeat_interleave(4, 2).repeat_interleave(4, 3)
        tokens, answers = remedies.shift_average(PatchColours(), x, views=12)
        plain, plain_answers = remedies.patches_and_answers(PatchColours(), x)
        torch.testing.assert_close(tokens, plain)
        torch.testing.assert_close(answers, plain_answers)

    def test_what_hangs_on_the_place_is_averaged_away(self):
        class Corner(PatchColours):
            def forward(self, x):
                tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
                spot = torch.zeros_like(tokens)
                spot[:, 0] = 100.0  # whatever the corner shows
                return self.blocks(tokens + spot).mean(1)

        x = torch.rand(1, 3, 24, 24)
        torch.manual_seed(0)
        tokens, _ = remedies.shift_average(Corner(), x, views=20)
        assert remedies.patches_and_answers(Corner(), x)[0].max() > 100
        assert tokens.max() < 60, f"{tokens.max():.0f} is left of 100"

    def test_the_teacher_ttr_has_four_registers_and_is_never_trained(self):
        config = replace(configured(VIT), model="planted", image_size=0, cutoff=0.0, teacher="ttr")
        module = recipe.build(config)
        assert module.teacher.num_prefix_tokens == 5 and module.student.num_prefix_tokens == 3
        module.train()
        assert module.student.training and not module.teacher.training
        recipe.loss(module, config, 0, "cpu")[0].backward()
        assert all(p.grad is None for p in module.teacher.parameters())
        assert module.student.reg_token.grad.abs().sum() > 0

    def test_a_teacher_that_keeps_the_outliers_is_refused(self):
        config = configured(VIT)
        source = recipe.build(config).source
        kept = replace(source, found=replace(source.found, share_after=0.6 * source.found.share_before))
        with pytest.raises(UserError, match="--teacher shift"):
            recipe._teacher(replace(config, teacher="ttr"), kept)


def test_the_distance_is_relative_to_the_length_wanted():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 5.0]], [[1.0, 0.0], [0.0, 7.0]]])  # mean squares 25 and 25
    tokens = wanted + torch.tensor([[[0.0, 5.0], [0.0, 0.0]], [[10.0, 0.0], [0.0, 0.0]]])
    assert recipe.distance(tokens, wanted).item() == pytest.approx((1 + 0 + 2 + 0) / 4)


class TestStarts:
    def test_registers_start_where_outliers_start_and_differ(self):
        """Known truth: the planted control's outliers, and what enters its first block there."""
        config = replace(configured(VIT), model="planted", image_size=0, cutoff=0.0, registers=4)
        source = recipe.build(config).source
        x = mend.handful(source.model).x
        module = source.model.module
        entering = module.patch_embed(x).flatten(1, -2) + module.pos_embed
        wanted = entering[planted.truth(x)]
        assert len(source.entering) > 20
        known = (source.entering[:, None] - wanted).norm(dim=2).min(1).values
        assert (known < 1e-4).float().mean() > 0.95  # `find` may see a few others, or miss some
        tokens = recipe.start(config, source)
        apart = torch.cdist(tokens, tokens) + 99 * torch.eye(4)
        assert apart.min() > 0.1 * tokens.norm(dim=1).mean(), "the registers are copies of each other"
        nearest = torch.cdist(source.entering, tokens).argmin(1)
        for i in range(4):  # k-means' own condition
            torch.testing.assert_close(tokens[i], source.entering[nearest == i].mean(0), rtol=1e-3, atol=1e-3)

    def test_random_starts_follow_the_seed(self):
        config = configured(VIT, start="random")
        source = recipe.build(config).source
        one, again, other = (recipe.start(c, source) for c in (config, config, replace(config, seed=1)))
        assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("free", ["all", "first", "registers"])
def test_what_is_free_changes_and_the_rest_stays(free, tmp_path):
    config = configured(VIT, free=free, learning_rate=1e-3, start="random")
    loop.train(config, recipe, tmp_path, progress=False)
    before = recipe.build(config).student.state_dict()
    after = zoo.load(f"file:{tmp_path / 'model.safetensors'}", "cpu").module.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    wanted = {
        "registers": lambda k: k == "reg_token",
        "first": lambda k: k.startswith(("reg_token", "pos_embed", "patch_embed", *(f"blocks.{i}." for i in range(6)))),
        "all": lambda k: True,
    }[free]
    assert "reg_token" in changed
    assert all(wanted(k) for k in changed), changed
    assert not {k for k in before if wanted(k) and "weight" in k} - changed


@pytest.mark.parametrize("name", [VIT, EVA])
def test_a_random_model_goes_through_and_comes_out_as_timms(name, photos, tmp_path):
    config = configured(name, steps=8, learning_rate=1e-3, data=str(photos), report=str(photos))
    result = loop.train(config, recipe, tmp_path / "run", progress=False)
    losses = pd.read_csv(tmp_path / "run" / "log.csv").loss
    assert losses[-3:].mean() < losses[:3].mean()
    path = tmp_path / "run" / "model.safetensors"
    ours = zoo.load(f"file:{path}", "cpu")
    option = "num_reg_tokens" if "eva" in name else "reg_tokens"
    plain = timm.create_model(
        name.removeprefix("random:"), img_size=SIZES[name], checkpoint_path=str(path), **{option: 2}
    )
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    torch.testing.assert_close(ours.module(x), plain.eval()(x))
    assert result["parameters"] == sum(p.numel() for p in plain.parameters())  # its teacher is not counted
    assert ours.anatomy.num_registers == 2 and ours.mean == zoo.load(name, "cpu").mean
    assert {"outliers", "outliers_before", "attention_on_registers", "features_apart"} <= result.keys()
    assert ("answers_kl" in result) == (ours.module.num_classes > 0)  # this Eva has no classes
    assert result["photos_of_report"] == 30 and "right" not in result
    assert capture(ours.module, x).num_registers == 2


def test_a_model_that_was_given_registers_can_be_given_more(tmp_path):
    loop.train(configured(VIT, steps=1), recipe, tmp_path / "run", progress=False)
    module = zoo.load(f"file:{tmp_path / 'run' / 'model.safetensors'}", "cpu").module
    assert with_registers(module, torch.zeros(1, 192)).num_prefix_tokens == 4


def test_a_file_that_is_written_again_is_read_again(tmp_path):
    name, digests = f"file:{tmp_path / 'model.safetensors'}", []
    for seed in (0, 1):
        torch.manual_seed(seed)
        saved.write(zoo.load(mini.build("xxs")), tmp_path / "model.safetensors")
        model = zoo.load(name, "cpu")
        norms = model.capture(mend.handful(model).x, layers=-1).patch_norms
        config, _ = loop.configure("registers", model=name, cutoff=norms.quantile(0.98).item())
        source = recipe.source(config)
        assert source.model.sha256 == model.sha256 and recipe.source(replace(config, steps=3)) is source
        digests.append(model.sha256)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("place", ["VITREG_MODELS", "runs/twins"])
def test_a_twin_is_found_by_its_name_and_pairs_with_its_base(place, tmp_path, monkeypatch):
    loop.train(configured(VIT, steps=1), recipe, tmp_path / "deit-ti-trained-reg2", progress=False)
    monkeypatch.setenv("VITREG_MODELS", str(tmp_path if place == "VITREG_MODELS" else tmp_path.parent))
    monkeypatch.setattr(names, "TWINS", tmp_path if place == "runs/twins" else tmp_path / "nothing")
    assert zoo.available("deit-ti-trained-reg2") == place
    twin = zoo.load("deit-ti-trained-reg2", "cpu")
    assert (twin.name, twin.label, twin.entry) == ("deit-ti-trained-reg2",) * 3
    assert (twin.base, twin.family, twin.registers, twin.registers_from) == ("deit-ti", "deit", 2, "fine-tuned")
    plain = Model("deit_tiny_patch16_224.fb_in1k", None, "", label="deit-ti", entry="deit-ti")
    assert pairs.pairs([plain, twin], "fine-tuned") == {"deit-ti-trained-reg2": "deit-ti"}
    assert pairs.pairs([plain, twin], "trained") == {"deit-ti-trained-reg2": "deit-ti"}  # by training, at any time
    assert not pairs.pairs([plain, twin], "test time")
    by_file = zoo.load(f"file:{tmp_path / 'deit-ti-trained-reg2' / 'model.safetensors'}", "cpu")
    assert (by_file.base, by_file.registers_from) == (VIT, "fine-tuned")


def test_a_mini_vit_with_registers_names_its_base(tmp_path):
    config, _ = loop.configure("registers", model="planted", teacher="ttr", steps=1, batch_size=2, eval_images=4)
    loop.train(config, recipe, tmp_path, progress=False)
    twin = zoo.load(f"file:{tmp_path / 'model.safetensors'}", "cpu")
    assert (twin.base, twin.family, twin.registers_from) == ("planted", "", "fine-tuned")


def test_a_model_without_outliers_gets_one_line(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = ["train", "registers", "--model", "mini-deit3", "--out", str(folder), "--device", "cpu"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1 and "mini-deit3 has nothing to mend" in said.out and not said.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(start="corners"), "unknown start 'corners'"),
        (dict(teacher="tts"), "did you mean ttr"),
        (dict(free="everything"), "unknown free"),
        (dict(model=""), "--model NAME"),
        (dict(registers=0, free="registers"), "nothing to train"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        recipe.build(replace(configured(VIT), **options))


class TestPhotos:
    def test_photos_of_the_report_are_never_trained_on(self, photos):
        training, held_out = recipe._photos(str(photos), 0, 0)
        assert len(training) == 28 and len(held_out) == 2 and not set(training) & set(held_out)
        few, still = recipe._photos(str(photos), 5, 0)
        assert len(few) == 5 and set(few) < set(training) and still == held_out
        assert set(recipe._photos(str(photos), 5, 1)[0]) != set(few)

    def test_shipped_photos_keep_the_four_of_the_picture(self):
        training, held_out = recipe._photos("", 0, 0)
        assert sorted(p.stem for p in held_out) == sorted(recipe.REPORTED) and len(training) == 6

    def test_too_few_photos_are_refused(self, photos):
        for path in sorted(photos.iterdir())[3:]:
            path.unlink()
        with pytest.raises(UserError, match="3 photos"):
            recipe._photos(str(photos), 0, 0)

    def test_every_photo_comes_once_an_epoch_in_an_order_of_the_seed(self, photos, monkeypatch):
        config = configured(VIT, data=str(photos), batch_size=7, steps=8)
        stream = recipe._stream(config, "cpu", "").data
        read = []
        monkeypatch.setattr(stream.pictures, "read", lambda i: read.append(i) or (images_of(photos, i), 0))
        for position in range(56):
            stream[position]
        assert sorted(read[:28]) == list(range(28)) == sorted(read[28:]) and read[:28] != read[28:]


def images_of(folder, i):
    from PIL import Image

    return Image.open(sorted(folder.iterdir())[i]).convert("RGB")


class TestRemedies:
    def test_empty_tokens_are_zeros_and_nothing_else(self, planted):
        model = zoo.load("planted+empty3", "cpu")
        assert model.role == "mended" and model.name.endswith("+empty3") and model.anatomy.num_registers == 3
        x = mend.handful(planted).x[:2]
        vit = planted.module
        tokens = vit.patch_embed(x).flatten(1, -2) + vit.pos_embed
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), torch.zeros(2, 3, vit.embed_dim), tokens], 1)
        wanted = vit.norm(vit.blocks(vit.norm_pre(tokens)))
        torch.testing.assert_close(model.module.forward_features(x), wanted)

    @pytest.mark.parametrize("name", ["planted+empty", "planted+emptyx", "planted+empty65", "planted+ttr"])
    def test_a_wrong_number_is_refused(self, name):
        with pytest.raises(UserError, match=r"write \+(empty|ttr)N with N from 0 to 64"):
            zoo.load(name, "cpu")

    def test_effects_are_those_worked_out_by_hand(self, planted):
        photos = images.load("scenes", planted, 6, seed=9)
        found = mend.find(planted)
        mended = mend.with_test_time_registers(planted, 2, found.neurons)
        labels = torch.arange(6)
        effects = remedies.effect(planted, mended, photos, found.cutoff, found.layer, labels)
        for i in range(6):
            x = photos.x[i : i + 1]
            one, other = (
                m.capture(x, ("norms", "attention"), layers=found.layer, queries=[0]) for m in (planted, mended)
            )
            mask = one.patch_norms[0, 0] > found.cutoff
            row = effects.iloc[i]
            assert row.outliers_before == pytest.approx(mask.float().mean().item())
            assert row.outliers == pytest.approx((other.patch_norms[0, 0] > found.cutoff).float().mean().item())
            attention = other.attention[found.layer][0, :, 0].mean(0)
            assert row.attention_on_registers == pytest.approx(attention[1:3].sum().item(), abs=1e-5)
            if mask.any():
                assert row.attention_on_outliers == pytest.approx(attention[3:][mask].sum().item(), abs=1e-5)
            with torch.no_grad():
                p, q = (m.module(x)[0].double().softmax(0) for m in (planted, mended))
            assert row.answers_kl == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-5)
            assert row.right == float(q.argmax() == i) and row.same_answer == float(p.argmax() == q.argmax())

    def test_a_distillation_token_is_no_register(self):
        distilled = zoo.load("random:deit_tiny_distilled_patch16_224", "cpu")
        x = torch.randn(2, 3, 224, 224)
        assert remedies.effect(distilled, distilled, x, 1.0).attention_on_registers.isna().all()
        given = mend.with_empty_tokens(distilled, 2)
        row = given.capture(x, "attention", layers=-1, queries=[0]).attention[11][:, :, 0].mean(1)
        effects = remedies.effect(distilled, given, x, 1.0)  # tokens: cls, dist, two of zeros, patches
        assert effects.attention_on_registers.tolist() == pytest.approx(row[:, 2:4].sum(1).tolist())

    def test_the_table_names_the_remedy_that_does_better(self, planted):
        """The planted norm is written by neurons whatever other tokens there are: zeros do not help, moving it does."""
        tried = remedies.trial(planted, mend.handful(planted).x, counts=(4,))
        removed, random, shifted = "planted+minus1", remedies.RANDOM, remedies.SHIFTED
        assert list(tried.table.index) == ["planted", "planted+empty4", "planted+ttr4", removed, random, shifted]
        assert list(tried.chosen_on.index) == ["planted", "planted+empty4", "planted+ttr4"]
        assert tried.table.outliers["planted+empty4"] == pytest.approx(tried.table.outliers["planted"], rel=0.2)
        assert tried.table.register_norm.dropna().index.tolist() == ["planted+empty4", "planted+ttr4", random]
        assert remedies.best(tried.chosen_on) == "planted+ttr4"

    def test_a_remedy_is_chosen_on_the_first_half_and_scored_on_the_second(self, planted):
        """The first half holds outliers, the second none: whatever is chosen, the scores are those of the second."""
        x, cutoff = mend.handful(planted, n=64).x, 95.0
        share = (planted.capture(x, layers=-1).patch_norms[:, 0] > cutoff).float().mean(1)
        with_outliers, without = share.argsort(descending=True)[:6], share.argsort()[:6]
        assert share[without].max() == 0 < share[with_outliers].min()
        tried = remedies.trial(planted, x[torch.cat([with_outliers, without])], cutoff, counts=(4,))
        assert tried.chosen_on.outliers["planted"] == pytest.approx(share[with_outliers].mean().item())
        assert tried.table.outliers["planted"] == 0 and remedies.best(tried.chosen_on) == "planted+ttr4"

    def test_a_removed_direction_takes_away_what_lies_along_it(self, planted):
        """Outliers of place alone lie along the first axis of the places' means; what is left is orthogonal to it."""
        model = zoo.load("mini-corners", "cpu")
        x = images.load("textures", model, 24).x
        layer = model.anatomy.depth - 2
        removed = mend.without_directions(model, 1, x, layer)
        before, after = (
            capture(m.module, x, "tokens", layers=layer).tokens[layer][:, model.anatomy.num_prefix_tokens :]
            for m in (model, removed)
        )
        torch.testing.assert_close(before, after)  # the block itself gives what it gave
        entering = []
        hook = removed.module.blocks[-1].attn.register_forward_pre_hook(lambda part, args: entering.append(args[0]))
        with torch.no_grad():
            removed.module(x)
        hook.remove()
        axis = torch.linalg.svd(before.mean(0) - before.mean((0, 1)))[2][0]
        norm1 = model.module.blocks[-1].norm1
        wanted = norm1(before - (before @ axis)[..., None] * axis)
        got = entering[0][:, model.anatomy.num_prefix_tokens :]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_the_best_remedy_leaves_fewest_outliers_then_turns_features_least_then_is_the_simplest(self):
        def table(*outliers, apart=(0.0, 0.1, 0.1)):
            return pd.DataFrame({"outliers": outliers, "features_apart": apart}, ["plain", "empty", "ttr"])

        assert remedies.best(table(0.1, 0.0, 0.0)) == "empty"
        assert remedies.best(table(0.1, 0.0005, 0.0)) == "empty"
        assert remedies.best(table(0.1, 0.01, 0.0)) == "ttr"
        assert remedies.best(table(0.1, 0.2, 0.1)) == "plain"
        assert remedies.best(table(0.1, 0.0, 0.0005, apart=(0.0, 0.3, 0.1))) == "ttr"
        assert remedies.best(table(0.1, 0.0, 0.01, apart=(0.0, 0.3, 0.1))) == "empty"

    def test_the_command_tries_the_empty_tokens_first(self, capsys):
        assert cli.main(["mend", "planted", "--registers", "4"]) == 0
        said = capsys.readouterr().out
        assert said.index("planted+empty4") < said.index("planted+ttr4")
        assert "that turn least: planted+ttr4" in said


class TestExperiment:
    """What workflow/twins.py runs and the notebook reads."""

    def test_cells_differ_and_keep_their_names(self):
        cells = experiment.cells()
        assert len({experiment.key(cell) for cell in cells}) == len(cells)
        assert {cell["arm"] for cell in cells} == {"doses", "empty", "ttr", "grid", "photos", "steps", "answers"}
        assert experiment.key(cells[0]) == experiment.key(dict(reversed(cells[0].items())))

    @pytest.mark.parametrize("how", ["zeros", "mean", "other image", "noise"])
    def test_registers_are_replaced_before_every_block(self, planted, how):
        model = mend.with_empty_tokens(planted, 2)
        x = mend.handful(planted).x[:3]
        entering = {}
        replaced = experiment.replaced(model, x, how)
        for i, block in enumerate(replaced.module.blocks):  # runs after the hook that replaces
            block.register_forward_pre_hook(lambda part, args, i=i: entering.__setitem__(i, args[0][:, 1:3].clone()))
        replaced.module.forward_features(x)
        plain = model.capture(x, "tokens")
        for i in range(1, len(entering)):
            new, own = entering[i], plain.tokens[i - 1][:, 1:3]
            if how == "zeros":
                assert not new.any()
            elif how == "mean":
                torch.testing.assert_close(new, own.mean(0).expand_as(new), rtol=1e-4, atol=1e-4)
            elif i == 1:  # later ones follow from the registers replaced before
                if how == "other image":
                    torch.testing.assert_close(new, own.roll(1, 0), rtol=1e-4, atol=1e-4)
                else:
                    torch.testing.assert_close(new.norm(dim=2), own.norm(dim=2), rtol=1e-4, atol=1e-4)
                    assert torch.nn.functional.cosine_similarity(new, own, dim=2).abs().max() < 0.9
        seen = model.capture(x, "norms")
        assert torch.equal(seen.norms, plain_norms(model, x)), "the model itself was changed"

    def test_an_unknown_replacement_is_refused(self, planted):
        with pytest.raises(ValueError, match="known are zeros, mean"):
            experiment.replaced(planted, mend.handful(planted).x[:1], "shuffle")


class TestTable:
    """What the notebook makes of the recorded rows."""

    def test_a_value_is_the_mean_over_seeds_photo_by_photo(self):
        rows = drawn.table()
        part = drawn.photos(rows, "doses", model="deit-ti", registers=4)
        assert len(part) == 100
        name = part.index[7]
        mine = rows[(rows.arm == "doses") & (rows.model == "deit-ti") & (rows.registers == 4) & (rows.photo == name)]
        mine = mine[mine.control == ""]
        assert sorted(mine.seed) == [0, 1, 2]
        assert part.outliers[name] == pytest.approx(mine.outliers.mean())

    def test_rows_that_are_not_there_are_refused(self):
        with pytest.raises(ValueError, match="no rows of doses"):
            drawn.photos(drawn.table(), "doses", model="deit-ti", registers=3)

    def test_the_live_training_is_judged_as_the_recorded_ones(self):
        """Four images; outliers before 4 %, attention on them 40 %."""
        gone = dict(outliers_before=4 * [0.04], attention_on_outliers_before=4 * [0.4], outliers=4 * [0.002])
        trained = pd.DataFrame(gone | dict(attention_on_outliers=4 * [0.02], attention_on_registers=4 * [0.3]))
        found = [list(claim)[:2] for claim in live.claims(trained, trained, registers=4, patches=95)]
        verdicts = dict(zip(("outliers", "control", "attention", "registers"), (True, False, True, True), strict=True))
        assert found == [[f"ours-{name}", verdict] for name, verdict in verdicts.items()]
        even = trained.assign(attention_on_registers=[0.04, 0.04, 0.12, 0.12])
        assert [claim[1] for claim in live.claims(trained, even, registers=4, patches=95)][-1] == "undecided"

    def test_cells_without_rows_are_missing(self):
        rows = drawn.table()
        assert all(cell in experiment.cells() for cell in drawn.missing(rows))
        fewer = rows[~((rows.arm == "photos") & (rows.model == "vit-ti") & (rows.photos == 50))]
        added = [cell for cell in drawn.missing(fewer) if cell not in drawn.missing(rows)]
        assert added == [dict(arm="photos", model="vit-ti", photos=50, seed=s) for s in (0, 1, 2)]

    def test_bars_at_a_glance_lie_where_the_verdicts_say(self):
        rows = drawn.table()
        wanted = {claim[0]: claim[1] for claim in drawn.claims(rows)}
        limits = {"outliers": (10, 10, 10), "attention": (20, 20, 20), "right": (2, 4, 4)}
        for axis, (asked, most) in zip(drawn.glance(rows).axes, limits.items(), strict=False):
            for bar, model, limit in zip(axis.containers, ("deit-ti", "vit-ti", "vit-ti-faster"), most, strict=True):
                low, high = bar.lines[2][0].get_segments()[0][:, 0]
                said = True if high <= limit + 1e-6 else False if low > limit + 1e-6 else "undecided"
                assert said == wanted[f"ours-{asked}-{model}"], (asked, model, low, high)

    def test_a_claim_is_judged_by_its_interval(self):
        values = pd.Series([-1.0, -2.0, -3.0] * 20)
        assert drawn.bounded(values) is True and drawn.bounded(-values) is False
        assert drawn.bounded(values - values.mean()) == "undecided"

    def test_the_interval_of_right_answers_is_that_of_the_change(self):
        part = pd.DataFrame({"right_before": [1.0, 0.0] * 30, "right": [1.0, 0.0] * 29 + [0.0, 0.0]})
        mean, low, high = drawn.spread(part, "right")
        assert mean == pytest.approx(100 * 29 / 60) and 40 < low < mean < high <= 50


def plain_norms(model, x):
    with torch.no_grad():
        tokens, norms = model.module._pos_embed(model.module.patch_embed(x)), []
        for block in model.module.blocks:
            tokens = block(tokens)
            norms.append(tokens.norm(dim=2))
    return torch.stack(norms, 1)


@pytest.mark.slow
class TestRealModels:
    def test_empty_tokens_take_deit_tis_outliers_and_not_vit_tis(self, real):
        """Its outliers arise from content, ViT-Ti's from places: numbers of 100 photos are in the notebook."""
        shares = {}
        for name, cut in (("deit-ti", 21.6), ("vit-ti", 100.0)):
            for n in (0, 4):
                model = zoo.load(f"{name}+empty{n}", "cpu")
                norms = model.capture(images.load("imagenet", model, 20), layers=-1).patch_norms
                shares[name, n] = (norms > cut).float().mean().item()
        assert shares["deit-ti", 4] < 0.4 * shares["deit-ti", 0]
        assert shares["vit-ti", 4] > 0.9 * shares["vit-ti", 0]

    def test_deit_ti_gives_its_outliers_to_trained_registers(self, real, tmp_path):
        config, _ = loop.configure("registers", model="deit-ti", cutoff=21.6, steps=12, workers=0, eval_images=20)
        config = replace(config, data=str(real / "data" / "unlabelled"), report="imagenet", learning_rate=6e-5)
        result = loop.train(config, recipe, tmp_path, progress=False)
        assert result["outliers"] < 0.1 * result["outliers_before"]
        assert result["attention_on_outliers"] < 0.2 * result["attention_on_outliers_before"]
        assert result["attention_on_registers"] > 0.15
        assert abs(result["right"] - result["right_before"]) <= 0.1


@pytest.mark.slow
def test_the_command_makes_a_twin_once(real, tmp_path, monkeypatch, capsys):
    arguments = ["weights", "--only", "deit-ti-trained-reg1", "--out", str(tmp_path), "--steps", "1"]
    assert twins.main(arguments) == 0
    monkeypatch.setattr(names, "TWINS", tmp_path)
    twin = zoo.load("deit-ti-trained-reg1", "cpu")
    assert (twin.registers, twin.base) == (1, "deit-ti")
    config = state.read_config(tmp_path / "deit-ti-trained-reg1")
    assert (config.data, config.cutoff, config.teacher, config.seed) == ("unlabelled", 21.6, "ttr", 0)
    assert not list(tmp_path.rglob("state.safetensors"))
    capsys.readouterr()
    assert twins.main(arguments) == 0
    assert "deit-ti-trained-reg1 is there" in capsys.readouterr().out
    assert twins.main([*arguments[:1], "--only", "deit-ti-trained-reg3"]) == 1


def test_no_photo_to_train_on_is_in_a_measured_set(real):
    def hashes(folder):
        files = [p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES]
        return {hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    unlabelled = hashes(real / "data" / "unlabelled")
    assert len(unlabelled) == 1500
    for folder in (real / "data").iterdir():
        if folder.name != "unlabelled":
            assert not unlabelled & hashes(folder), folder.name


def test_the_weights_say_what_builds_them(tmp_path):
    from safetensors import safe_open

    loop.train(configured(VIT, steps=1), recipe, tmp_path, progress=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        metadata = f.metadata()
    described = json.loads(metadata["timm"])
    assert described["architecture"] == "vit_tiny_patch16_224" and described["model_args"]["reg_tokens"] == 2
    assert json.loads(metadata["config"])["model"] == VIT
    assert state.read_config(tmp_path).model == VIT


def test_the_report_of_labelled_photos_has_accuracy(photos, tmp_path, monkeypatch):
    """Known by the model's own answers: labels.csv holds them for two photos of three."""
    model = zoo.load(VIT, "cpu", 64)
    folder = tmp_path / "data" / "own"
    folder.mkdir(parents=True)
    for path in sorted(photos.iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("VITREG_DATA", str(tmp_path / "data"))
    with torch.no_grad():
        answers = model.module(images.load("own", model, 3).x).argmax(1).tolist()
    answers[2] += 1
    rows = [f"{p.name},{a}" for p, a in zip(sorted(folder.iterdir()), answers, strict=True)]
    (folder / "labels.csv").write_text("file,class_index\n" + "\n".join(rows) + "\n")
    result = loop.train(configured(VIT, steps=1, report="own"), recipe, tmp_path / "run", progress=False)
    assert result["right_before"] == pytest.approx(2 / 3)


def test_a_zoo_model_stays_as_it_was(tmp_path):
    model = zoo.load(VIT, "cpu", 64)
    assert isinstance(model, Model)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    with_registers(model.module, torch.ones(2, 192))
    mend.with_empty_tokens(model, 2)
    assert all(torch.equal(before[k], v) for k, v in model.module.state_dict().items())
    assert model.anatomy.num_registers == 0
