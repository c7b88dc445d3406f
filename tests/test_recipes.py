"""What each recipe adds to the loop: losses against formulas written out, who gets gradients, views and masks."""

from __future__ import annotations

import math

import clip
import deit3
import dinov2
import lejepa
import mae
import pandas as pd
import pytest
import tab02_zeroshot
import torch
import torch.nn.functional as F
import views

from vitreg_lib.data import scenes
from vitreg_lib.model.text import tokenizer
from vitreg_lib.train import loop

RECIPES = {"deit3": deit3, "clip": clip, "dinov2": dinov2, "lejepa": lejepa, "mae": mae}


def config(recipe: str, **options):
    small = dict(size="xxs", image_size=64, batch_size=8, registers=2, steps=12, warmup=2, eval_images=32)
    if recipe == "dinov2":
        small["prototypes"] = 32
    return loop.configure(recipe, **small | options)[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_loss_falls_in_a_short_run(recipe, tmp_path):
    chosen = config(recipe, steps=30, batch_size=16, learning_rate=0.01, optimizer="muon", telemetry_images=8)
    result = loop.train(chosen, RECIPES[recipe], tmp_path, progress=False)
    losses = pd.read_csv(tmp_path / "log.csv").loss
    assert losses[-5:].mean() < losses[:5].mean() - 0.02
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_registers_get_a_gradient(recipe):
    chosen = config(recipe)
    module = RECIPES[recipe].build(chosen)
    RECIPES[recipe].loss(module, chosen, 0, "cpu")[0].backward()
    trained = module.student if recipe == "dinov2" else RECIPES[recipe].backbone(module)
    assert trained.reg_token.grad.abs().sum() > 0


class TestClip:
    def test_loss_is_the_symmetric_cross_entropy(self):
        chosen = config("clip")
        module = clip.build(chosen)
        value, numbers = clip.loss(module, chosen, 3, "cpu")
        batch = scenes.render(range(24, 32), 64)
        image = module.visual((batch.pixels - 0.5) / 0.5)
        text = module.text(tokenizer()(clip.captions_of(batch)))
        similarity = torch.stack(
            [torch.stack([F.cosine_similarity(i, t, dim=0) for t in text]) for i in image]
        ) / torch.tensor(0.07)
        by_image = -torch.stack([similarity[i, i] - similarity[i].logsumexp(0) for i in range(8)]).mean()
        by_text = -torch.stack([similarity[i, i] - similarity[:, i].logsumexp(0) for i in range(8)]).mean()
        torch.testing.assert_close(value, (by_image + by_text) / 2, rtol=1e-4, atol=1e-5)
        assert numbers["scale"].item() == pytest.approx(1 / 0.07)

    def test_no_caption_is_cut(self):
        captions = clip.captions_of(scenes.render(range(2000), 64))
        ids = tokenizer()(captions)
        end = tokenizer().eot_token_id
        assert (ids == end).sum(1).eq(1).all()  # a caption that is cut ends in the end token too, but is full
        assert (ids[:, -1] == 0).all()

    def test_every_attribute_has_a_class_of_length_one_for_each_value(self):
        module = clip.build(config("clip"))
        for name, values in scenes.ATTRIBUTES.items():
            embedded = clip.class_embeddings(module.encode_text, name)
            assert embedded.shape == (len(values), 64)
            torch.testing.assert_close(embedded.norm(dim=1), torch.ones(len(values)))

    def test_text_tower_comes_back_from_its_file(self, tmp_path):
        chosen = config("clip", steps=1, batch_size=4, telemetry_images=4)
        loop.train(chosen, clip, tmp_path, progress=False)
        tower = tab02_zeroshot.load_text(tmp_path / "model.text.safetensors")
        torch.manual_seed(chosen.seed)
        module = clip.build(chosen)
        before = module.text.state_dict()
        assert tower.state_dict().keys() == before.keys()
        assert tower(tokenizer()(["a red disc"])).shape == (1, 64)


class TestDinov2:
    def test_answers_are_balanced_as_three_rounds_by_hand_do(self):
        torch.manual_seed(0)
        logits = 0.3 * torch.randn(64, 16)
        answers = dinov2.balance(logits, 0.1).exp()
        q = (logits.double() / 0.1).exp()
        for _ in range(3):
            q = q / q.sum(0) / 16  # every prototype the same in all
            q = q / q.sum(1, keepdim=True) / 64  # every image the same
        torch.testing.assert_close(answers, (64 * q).float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(answers.sum(1), torch.ones(64))
        uneven = [(p.sum(0) / 64 - 1 / 16).abs().max() for p in (answers, (logits / 0.1).softmax(1))]
        assert uneven[0] < 0.5 * uneven[1]

    def test_loss_is_dino_and_ibot_and_koleo_written_out(self):
        chosen = config("dinov2", global_size=48, local_crops=2)
        torch.manual_seed(1)
        module = dinov2.build(chosen)
        with torch.no_grad():  # a teacher that differs
            for p in module.teacher.parameters():
                p.add_(0.02 * torch.randn_like(p))
        value, numbers = dinov2.loss(module, chosen, 5, "cpu")

        index = torch.arange(40, 48)
        pixels = scenes.render(index, 64).pixels

        def view(k):
            size, scale = (48, dinov2.GLOBAL) if k < 2 else (32, dinov2.LOCAL)
            return (views.crop(pixels, index, size, scale, 0, k) - 0.5) / 0.5

        mask = dinov2.masks(chosen, 5)
        temperature = dinov2.teacher_temperature(chosen, 5)
        seen = [dinov2.tokens(module.teacher, view(k)) for k in (0, 1)]
        answers = dinov2.balance(module.teacher_heads["cls"](torch.cat([s[:, 0] for s in seen])), temperature).exp()
        student = [dinov2.tokens(module.student, view(k), mask[k], module.mask_token) for k in (0, 1)]
        student += [dinov2.tokens(module.student, view(k)) for k in (2, 3)]
        said = [(module.student_heads["cls"](s[:, 0]) / 0.1).log_softmax(1) for s in student]
        terms = [-(answers[8 * t : 8 * t + 8] * said[s]).sum(1).mean() for t in (0, 1) for s in range(4) if s != t]
        assert numbers["dino"].item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-4)

        where = [(k, i, *cell) for k in (0, 1) for i in range(8) for cell in mask[k, i].nonzero().tolist()]
        patch = [
            (s[:, 3:].unflatten(1, (6, 6)), t[:, 3:].unflatten(1, (6, 6))) for s, t in zip(student, seen, strict=False)
        ]
        hidden = torch.stack([patch[k][1][i, r, c] for k, i, r, c in where])
        hidden = dinov2.balance(module.teacher_heads["patch"](hidden), temperature).exp()
        given = torch.stack([patch[k][0][i, r, c] for k, i, r, c in where])
        given = (module.student_heads["patch"](given) / 0.1).log_softmax(1)
        total = sum(-(hidden[n] * given[n]).sum() / mask[k, i].sum() for n, (k, i, _, _) in enumerate(where))
        assert numbers["ibot"].item() == pytest.approx(total.item() / 16, rel=1e-4)

        koleo = 0
        for s in student[:2]:
            x = F.normalize(s[:, 0], dim=1)
            distance = torch.cdist(x, x) + 9 * torch.eye(8)
            koleo -= distance.amin(1).log().mean() / 2
        assert numbers["koleo"].item() == pytest.approx(koleo.item(), rel=1e-3)
        assert value.item() == pytest.approx(
            (numbers["dino"] + numbers["ibot"] + 0.1 * numbers["koleo"]).item(), rel=1e-5
        )

    def test_teacher_gets_no_gradient_and_follows_the_student(self):
        chosen = config("dinov2", momentum=0.9)
        module = dinov2.build(chosen)
        dinov2.loss(module, chosen, 0, "cpu")[0].backward()
        assert all(p.grad is None for p in [*module.teacher.parameters(), *module.teacher_heads.parameters()])
        assert module.mask_token.grad.abs().sum() > 0
        before = module.teacher.cls_token.clone()
        with torch.no_grad():
            module.student.cls_token.add_(1.0)
        dinov2.after_step(module, chosen, 0)
        torch.testing.assert_close(module.teacher.cls_token, 0.9 * before + 0.1 * module.student.cls_token)
        dinov2.after_step(module, chosen, chosen.steps)  # at the end the teacher stands still
        torch.testing.assert_close(module.teacher.cls_token, 0.9 * before + 0.1 * module.student.cls_token)

    @pytest.mark.parametrize("registers", [0, 4])
    def test_tokens_at_the_models_own_size_are_timms(self, registers):
        vit = dinov2.build(config("dinov2", registers=registers)).student.eval()
        pixels = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(dinov2.tokens(vit, pixels), vit.forward_features(pixels))
        small = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(dinov2.tokens(vit, small), vit.forward_features(small))  # timm antialiases
        assert not torch.allclose(dinov2.tokens(vit, small, antialias=False), vit.forward_features(small), atol=1e-5)

    def test_masks_hide_blocks_in_half_of_the_crops_and_are_the_same_again(self):
        chosen = config("dinov2", batch_size=64)
        mask = dinov2.masks(chosen, 7)
        assert mask.shape == (2, 64, 8, 8)
        share = mask.flatten(2).float().mean(2)
        assert (share > 0).float().mean() == 0.5 and share.max() <= 0.5
        assert torch.equal(mask, dinov2.masks(chosen, 7)) and not torch.equal(mask, dinov2.masks(chosen, 8))

    def test_nearest_neighbours_by_hand(self):
        chosen = config("dinov2", eval_images=16)
        module = dinov2.build(chosen)
        found = dinov2.knn(module.teacher, chosen, "cpu", neighbours=3)
        batch = scenes.render(range(scenes.HELD_OUT + 64, scenes.HELD_OUT + 64 + 48), 64)
        with torch.no_grad():
            cls = F.normalize(module.teacher.eval().forward_features((batch.pixels - 0.5) / 0.5)[:, 0], dim=1)
        right = 0
        for q in range(16):
            cosine = cls[16:] @ cls[q]
            votes = torch.zeros(8)
            for n in cosine.argsort(descending=True)[:3].tolist():
                votes[batch.label[16 + n]] += math.exp(cosine[n] / 0.07)
            right += int(votes.argmax() == batch.label[q])
        assert found["knn_shape"] == right / 16


class TestViews:
    def test_a_view_depends_on_the_image_and_not_on_its_batch(self):
        index = torch.arange(6)
        pixels = torch.rand(6, 3, 64, 64)
        whole = views.crop(pixels, index, 32, (0.2, 0.8), 1, 0)
        torch.testing.assert_close(views.crop(pixels[2:4], index[2:4], 32, (0.2, 0.8), 1, 0), whole[2:4])
        assert not torch.allclose(views.crop(pixels, index, 32, (0.2, 0.8), 1, 1), whole)

    def test_crops_lie_inside_and_have_the_wanted_area(self):
        centre, half = views.boxes(torch.rand(500, 5), (0.1, 0.4))
        assert ((centre.abs() + half.abs()) <= 1 + 1e-6).all()
        area = half.abs().prod(1)
        assert area.min() >= 0.1 - 1e-6 and area.max() <= 0.4 + 1e-6
        assert 0.4 < (half[:, 0] < 0).float().mean() < 0.6

    def test_light_without_change_is_the_identity(self):
        pixels = torch.rand(3, 3, 8, 8)
        torch.testing.assert_close(views.light(pixels, torch.full((3, 5), 0.5)), pixels)


class TestMae:
    def test_visible_and_masked_are_all_patches_once(self):
        visible, masked = mae.split(torch.arange(5), 64, 0.75, 0)
        assert visible.shape == (5, 16) and masked.shape == (5, 48)
        assert torch.equal(torch.cat([visible, masked], 1).sort(1).values, torch.arange(64).expand(5, 64))

    def test_hidden_pixels_never_reach_the_prediction(self):
        module = mae.build(config("mae")).eval()
        visible, masked = mae.split(torch.arange(2), 64, 0.75, 0)
        images = torch.randn(2, 3, 64, 64)
        changed = F.unfold(images, 8, stride=8).transpose(1, 2)
        changed = changed.scatter(1, masked[..., None].expand(-1, -1, 192), 9.0)
        changed = F.fold(changed.transpose(1, 2), (64, 64), 8, stride=8)
        torch.testing.assert_close(module(images, visible), module(changed, visible))

    def test_error_is_that_of_normalised_masked_pixels(self):
        chosen = config("mae", batch_size=3)
        module = mae.build(chosen)
        value, _ = mae.loss(module, chosen, 2, "cpu")
        pixels = scenes.render(range(6, 9), 64).pixels
        visible, masked = mae.split(torch.arange(6, 9), 64, 0.75, 0)
        said = module((pixels - 0.5) / 0.5, visible)
        errors = []
        for i in range(3):
            for patch in masked[i].tolist():
                r, c = divmod(patch, 8)
                wanted = pixels[i, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].flatten()
                wanted = (wanted - wanted.mean()) / (wanted.var() + 1e-4).sqrt()
                errors.append((said[i, patch] - wanted).square().mean())
        torch.testing.assert_close(value, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


class TestLeJEPA:
    def test_sigreg_is_the_test_of_epps_and_pulley(self):
        x = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(5)
        value = lejepa.sigreg(x)
        torch.manual_seed(5)
        directions = torch.randn(3, lejepa.SLICES).T
        t = torch.linspace(-3, 3, 33)  # both halves, the same trapezoidal rule
        wanted = []
        for view in x:
            for direction in directions:
                along = view @ (direction / direction.norm())
                sample = torch.exp(1j * t[:, None] * along).mean(1)
                gap = (sample - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
                wanted.append(40 * torch.trapezoid(gap, t))
        torch.testing.assert_close(value, torch.stack(wanted).mean(), rtol=1e-4, atol=1e-5)

    def test_sigreg_tells_a_normal_sample_from_others(self):
        normal = torch.randn(1, 2000, 8, generator=torch.Generator().manual_seed(0))
        others = {"collapsed": torch.zeros_like(normal), "long": 2 * normal, "two values": normal.sign()}
        assert lejepa.sigreg(normal) < 2
        for name, other in others.items():
            assert lejepa.sigreg(other) > 5, name  # "two values" are nearly normal along most directions

    def test_views_agree_where_all_give_one_answer(self):
        chosen = config("lejepa", local_crops=0)
        module = lejepa.build(chosen)
        with torch.no_grad():
            module.projector[-1].weight.zero_()
        assert lejepa.loss(module, chosen, 0, "cpu")[1]["agree"].item() == pytest.approx(0, abs=1e-9)
