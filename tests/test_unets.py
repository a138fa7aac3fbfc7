"""diffusers' U-Nets and autoencoders: read, merged, and the law held, at random time steps and odd sizes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fxmerge.core.plan import Plan
from fxmerge.operators import Map
from fxmerge.passes.annotate import annotate
from fxmerge.passes.fuse_segments import fuse
from fxmerge.passes.linearize import Linearize
from tests.laws import random_plan, relative_error
from tests.unets import MODELS, searched

#: Of all models: a side must divide by what a U-Net makes smaller. The decoder and the encoder take odd ones, too.
SIZES = ((8, 8), (6, 10), (12, 4))
ODD = {"encoder": ((9, 7), (13, 6)), "decoder": ((5, 7), (3, 9))}


def only(outputs: Any) -> torch.Tensor:
    [value] = pytree.tree_leaves(outputs)
    assert isinstance(value, torch.Tensor)
    return value


@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_and_norm_is_in_a_segment(name: str) -> None:
    _, findings, proposals = searched(name)
    held = {name for segment in findings.segments for name in segment.nodes}
    layers = [n.name for n, v in findings.verdicts.items() if isinstance(v, Map) and v.role == "convolution" and len(n.users) == 1]
    assert len(held & set(layers)) >= 0.9 * len(layers)
    kinds = {(c.kind, bool(c.norms), bool(c.moved)) for p in proposals for c in p.candidates}
    assert {("composed", True, False), ("fitted", True, False), ("fitted", True, True)} <= kinds


@pytest.mark.parametrize("name", MODELS)
def test_the_law_holds_for_random_plans(name: str) -> None:
    _, findings, proposals = searched(name)
    inputs, sizes = MODELS[name][1], (*SIZES, *ODD.get(name, ()))

    @settings(max_examples=8)
    @given(st.randoms(use_true_random=False), st.sampled_from(sizes), st.integers(0, 99), st.booleans(), st.booleans())
    def law(rng: random.Random, size: tuple[int, int], seed: int, norms: bool, hard: bool) -> None:
        """Composed candidates alone make it hard: what is fitted is one convolution from the start."""
        offered = [p for p in proposals if any(c.kind == "composed" for c in p.candidates)] if hard else proposals
        plan = random_plan(findings, offered, rng)
        torch.manual_seed(seed)
        student = Linearize(norms=norms, own=False).apply(annotate(findings.graph, plan))
        merged, given = fuse(student), inputs(1 + seed % 3, size, seed)
        with torch.no_grad():
            assert relative_error(only(student(*given)), only(merged(*given))) <= 1e-9

    law()


def test_a_plan_with_norms_survives_json() -> None:
    _, findings, proposals = searched("unet")
    for candidate in [c for p in proposals for c in p.candidates if c.norms or c.moved or c.sides]:
        plan = Plan(findings.fingerprint, (candidate,))
        assert Plan.from_json(plan.to_json()) == plan


def test_candidates_have_names_of_their_own() -> None:
    for name in MODELS:
        names = [c.id for p in searched(name)[2] for c in p.candidates]
        assert len(names) == len(set(names))


BEYOND_A_BLOCK = {
    "upsampling and the convolution behind it": ("unet", ("up_blocks_0_upsamplers_0_interpolate", "up_blocks_0_upsamplers_0_conv")),
    "the output convolution": ("unet", ("conv_out",)),
    "a strided convolution": ("unet", ("down_blocks_0_downsamplers_0_conv",)),
    "a shortcut of 1x1 with its branch": ("unet", ("up_blocks_0_resnets_0_conv_shortcut", "up_blocks_0_resnets_0_conv2")),
    "blocks in a row": ("decoder", ("up_blocks_0_resnets_0_conv2", "up_blocks_0_resnets_1_conv1")),
    "the pool of a block that makes the image smaller": (
        "average pools",
        ("down_blocks_0_downsamplers_0_downsample_conv_1", "down_blocks_0_downsamplers_0_conv2"),
    ),
}


@pytest.mark.parametrize("case", BEYOND_A_BLOCK)
def test_candidates_go_beyond_single_convolutions(case: str) -> None:
    model, together = BEYOND_A_BLOCK[case]
    _, _, proposals = searched(model)
    offered = [p for p in proposals if set(together) <= set(p.segment.nodes)]
    kinds = {candidate.kind for proposal in offered for candidate in proposal.candidates}
    assert "fitted" in kinds or "composed" in kinds
