"""Which tensors student and original share, and how both are made to give them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxmerge
from fxmerge.testing import assert_untouched, snapshot
from fxmerge.tune import shared_cuts, with_features
from fxmerge.tune.features import feature_loss
from tests.small import images, network
from tests.tune.small import made


def test_cuts_behind_the_first_merge_and_outside_all_merges_are_shared() -> None:
    names = shared_cuts(made().fitted, made().graph)
    assert {merge.end for merge in made().plan.merges} <= set(names)
    assert names == tuple(node.name for node in made().graph.graph.nodes if node.name in names)
    exits = {merge.exit for merge in made().plan.merges}
    findings = fxmerge.find_segments(made().graph)
    covered = [s.nodes for s in findings.segments for m in made().plan.merges if (s.entry, s.end) == (m.entry, m.end)]
    inside = {node for nodes in covered for node in nodes[: next(i for i, name in enumerate(nodes) if name in exits)]}
    assert inside
    assert not inside & set(names)
    assert made().plan.merges[0].entry not in names  # before the first merge both compute the same


def test_the_exit_of_a_merge_is_shared_where_no_activation_follows_it() -> None:
    findings = fxmerge.find_segments(made().graph)
    candidates = [c for p in fxmerge.propose(findings) for c in p.candidates]
    branch = next(c for c in candidates if c.kind == "fitted" and c.exit == c.end and c.activations)
    plan = fxmerge.Plan(findings.fingerprint, (branch,))
    names = shared_cuts(fxmerge.linearize(fxmerge.annotate(made().graph, plan)), made().graph)
    assert branch.end in names
    with_relu = made().plan.merges[0]
    assert with_relu.exit not in shared_cuts(made().fitted, made().graph)


def test_a_student_of_another_graph_is_refused() -> None:
    other = fxmerge.trace(network(blocks=2), images(4))
    with pytest.raises(fxmerge.PlanMismatchError, match="not made from this graph"):
        shared_cuts(made().fitted, other)


def test_features_come_with_the_output_and_are_what_the_nodes_compute() -> None:
    names = shared_cuts(made().fitted, made().graph)
    before = snapshot(made().graph)
    output, features = with_features(made().graph, names)(images(3))
    assert torch.equal(output, made().graph(images(3)))
    assert [tuple(f.shape[1:]) for f in features] == [
        tuple(node.meta["fxmerge"].shape[1:]) for node in made().graph.graph.nodes if node.name in names
    ]
    interpreter = torch.fx.Interpreter(made().graph, garbage_collect_values=False)
    interpreter.run(images(3))
    for name, feature in zip(names, features, strict=True):
        assert torch.equal(feature, next(value for node, value in interpreter.env.items() if node.name == name))
    assert_untouched(made().graph, before)


def test_features_of_an_exported_network_come_beside_its_nested_output() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network(blocks=1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.body(x), "twice": 2 * x}

    graph = fxmerge.trace(Nested(), images(4), front_end="export")
    name = next(node.name for node in graph.graph.nodes if "conv" in node.name)
    output, features = with_features(graph, [name])(images(2))
    assert sorted(output) == ["logits", "twice"]
    assert torch.equal(output["logits"], graph(images(2))["logits"])
    assert len(features) == 1


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(fxmerge.InputError, match="no node 'nowhere'"):
        with_features(made().graph, ["nowhere"])


def test_the_loss_is_the_error_over_the_variance() -> None:
    wanted = images(4)
    around = wanted - wanted.mean((0, 2, 3), keepdim=True)
    loss = feature_loss([wanted, wanted + 0.5 * around], [wanted, wanted])
    assert float(loss) == pytest.approx(0.5 * 0.25, rel=1e-5)
    assert float(feature_loss([], [])) == 0.0
