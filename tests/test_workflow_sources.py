"""How the sources of the shipped workflows are read: parts, variants, likeness, links."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vader_nodes.tools import workflow_sources
from vader_nodes.tools.workflow_sources import downloads, graph, merged, sources

PART = """
[groups.all]
title = "All"
note = "First."

[nodes.model]
class = "VaderLoadVideoModel"
title = "Model"
group = "all"
inputs.checkpoint = "mini/modelscope"

[nodes.sample]
class = "VaderApplyLoRASample"
title = "Sample of {name}"
group = "all"
inputs.model = "@model"
inputs.steps = 10

[paper.nodes.sample]
inputs.steps = 25

[[paper.nodes.model.models]]
name = "model.ckpt"
"""
SOURCE = """
parts = ["base"]
about = "About {experiment}."

[groups.all]
note = "Second."

[nodes.again]
like = "sample"
title = "Again"
inputs.lora = "@train.report"

[nodes.train]
class = "VaderTrainLoRA"
title = "Train"
group = "all"

[mini]
about = "Small."

[[paper.nodes.model.models]]
name = "more.ckpt"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "source" / "parts").mkdir(parents=True)
    (tmp_path / "source" / "parts" / "base.toml").write_text(PART)
    (tmp_path / "source" / "story.toml").write_text(SOURCE)
    monkeypatch.setattr(workflow_sources, "FOLDER", tmp_path)
    sources.cache_clear()
    yield tmp_path / "source"
    sources.cache_clear()


def test_a_source_with_variants_makes_a_workflow_of_each(folder: Path) -> None:
    assert list(sources()) == ["story_mini", "story_paper"]
    mini, paper = sources().values()
    assert mini["about"] == "About story.\n\nSmall.\n"
    assert paper["about"] == "About story."
    assert mini["groups"]["all"] == {"title": "All", "note": "First.\n\nSecond.\n"}
    assert mini["nodes"]["sample"]["title"] == "Sample of story_mini"
    assert [model["name"] for model in downloads(paper)] == ["model.ckpt", "more.ckpt"]
    assert downloads(mini) == []


def test_a_node_like_another_follows_its_variant(folder: Path) -> None:
    for source, steps in zip(sources().values(), (10, 25), strict=True):
        again = source["nodes"]["again"]
        assert again["title"] == "Again"
        assert again["inputs"] == {"model": "@model", "steps": steps, "lora": "@train.report"}
        assert list(source["nodes"]) == ["model", "sample", "again", "train"]


def test_links_become_numbers(folder: Path) -> None:
    drawn = graph(sources()["story_paper"])
    assert drawn["3"] == {
        "class_type": "VaderApplyLoRASample",
        "inputs": {"model": ["1", 0], "steps": 25, "lora": ["4", 2]},
        "_meta": {"title": "Again"},
    }


@pytest.mark.parametrize(
    "wrong",
    ['[nodes.x]\nclass = "X"\ntitle = "X"\ngroup = "none"', "[nodes.model]\nclas = 1", "[groups.empty]", "abuot = 1"],
)
def test_what_means_nothing_is_refused(folder: Path, wrong: str) -> None:
    (folder / "story.toml").write_text('about = "About."\nparts = ["base"]\n' + wrong)
    with pytest.raises(ValueError, match="story"):
        sources()


@pytest.mark.parametrize(
    ("under", "over", "result"),
    [
        ({"a": 1, "b": {"c": 1}}, {"b": {"d": 2}}, {"a": 1, "b": {"c": 1, "d": 2}}),
        ({"a": [1]}, {"a": [2]}, {"a": [1, 2]}),
        ({"title": "old"}, {"title": "new"}, {"title": "new"}),
        ({"note": "old"}, {"note": "new"}, {"note": "old\n\nnew\n"}),
    ],
)
def test_layers(under: Any, over: Any, result: Any) -> None:
    assert merged(under, over) == result
