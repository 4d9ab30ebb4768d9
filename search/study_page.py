"""The study's page in optuna-dashboard: a note with the front, and its picture as an artefact.

The dashboard draws all trials but neither a front's line nor the base; the picture has both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.artifacts import get_all_artifact_meta, upload_artifact
from optuna_dashboard import get_note, save_note  # type: ignore[import-untyped]

from search.front import Front
from search.report import front_caption, front_cells
from search.study import SearchStudy

ABOUT = "Front of "
"""Begins the notes that are ours; one that a reader wrote is left alone."""


def show_on_page(study: SearchStudy, front: Front, picture: Path) -> bool:
    """Write the note and the picture; False where the page has a note of somebody else's.

    Args:
        study: whose page it is.
        front: of the study.
        picture: a PNG of it. The artefact keeps its place, so that links to it stay good.
    """
    before = get_note(study.optuna)
    if before and not before.startswith(f"## {ABOUT}"):
        return False
    artifact = _kept(study, picture)
    body = _body(study, front, artifact)
    if body != before:
        save_note(study.optuna, body)
    return True


def _kept(study: SearchStudy, picture: Path) -> str:
    """The artefact's id: the one of the study's page, or a new one."""
    storage: Any = study.optuna._storage
    for meta in get_all_artifact_meta(study.optuna, storage=storage):
        if meta.filename == picture.name:
            with picture.open("rb") as content:
                study.store.write(meta.artifact_id, content)
            return str(meta.artifact_id)
    return upload_artifact(artifact_store=study.store, file_path=str(picture), study_or_trial=study.optuna)


def _body(study: SearchStudy, front: Front, artifact: str) -> str:
    cells = front_cells(front.rows, front.base)
    lines = [
        f"## {ABOUT}{study.name}",
        "",
        f"![front](/artifacts/{study.optuna._study_id}/{artifact})",
        "",
        f"| {' | '.join(cells[0])} |",
        "|" + "---|" * len(cells[0]),
        *(f"| {' | '.join(text.replace('|', '/') for text in row.values())} |" for row in cells),
        "",
        front_caption(front.base, front.rows),
        *(f"\nNote: {remark}." for remark in front.remarks),
    ]
    return "\n".join(lines)
