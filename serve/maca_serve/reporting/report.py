"""One self-contained HTML page: tables and plots inline, nothing fetched from anywhere."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from maca_serve.evaluation.recovery import recovered
from maca_serve.formats.checkpoint import Checkpoint
from maca_serve.reporting.plots import (
    perplexity_plot,
    probe_plot,
    recovery_plot,
    size_plot,
    tasks_plot,
)
from maca_serve.reporting.run_records import (
    NOTABLE_RATIO,
    diagonal_views,
    losses_plot,
    run_rows,
    tuning_plot,
)
from maca_serve.reporting.speed_plots import speed_figures
from maca_serve.reporting.speed_view import alike, speed_grids
from maca_serve.reporting.summary import headline as first_line


def render_report(results: dict[str, Any], checkpoints: list[Checkpoint]) -> str:
    """Render a comparison.

    Args:
        results: as in results.json: the base first, with accuracy, throughput, recovery and
            verdicts.
        checkpoints: the same checkpoints, for what their folders say about how they were made.

    Returns:
        The page.
    """
    environment = Environment(
        loader=PackageLoader("maca_serve", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"recovered": recovered, "show": show}
    entries = results["checkpoints"]
    return environment.get_template("report.html.j2").render(
        results=results,
        entries=entries,
        base=entries[0],
        first_line=first_line(results),
        plots={name: Markup(svg) for name, svg in _plots(results).items()},
        probe_plots=[Markup(probe_plot(entries, name)) for name in entries[0]["probes"]],
        speed_figures=[(Markup(svg), caption) for svg, caption in speed_figures(entries)],
        alike=list(alike(entries)),
        eager=_eager(results),
        speed_grids=list(speed_grids(results)),
        inspections=[_inspect(checkpoint) for checkpoint in checkpoints],
        losses=_markup(losses_plot(checkpoints)),
        notable_ratio=NOTABLE_RATIO,
    )


def show(form: str, value: Any) -> str:
    """A number, or a list of them, in a form such as `%.2f`; a dash for null."""
    return "–" if value is None else form % (tuple(value) if isinstance(value, list) else value)


def _plots(results: dict[str, Any]) -> dict[str, str]:
    entries = results["checkpoints"]
    plots = {
        "perplexity": perplexity_plot(entries),
        "recovery": recovery_plot(entries, results["settings"]["rules"]["kept_percent"]),
        "size": size_plot(entries),
    }
    if entries[0]["tasks"]:
        plots["tasks"] = tasks_plot(entries)
    return plots


def _eager(results: dict[str, Any]) -> bool:
    engines = results["settings"]["engine"].values()
    return any("--enforce-eager" in engine["arguments"] for engine in engines)


def _inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "rows": run_rows(checkpoint.run_record),
        "tuning": _markup(tuning_plot(checkpoint)),
        "diagonals": [
            {
                "module": view.module,
                "svg": _markup(view.svg),
                "share": view.share,
                "channels": view.channels,
            }
            for view in diagonal_views(checkpoint)
        ],
    }


def _markup(svg: str | None) -> Markup | None:
    # Only matplotlib's own SVG, whose text it escapes, is taken as markup.
    return Markup(svg) if svg is not None else None
