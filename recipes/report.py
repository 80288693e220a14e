"""Write a run's page: one HTML file with all its results, which opens anywhere without a network.

    python recipes/report.py --runs out/demo

Compare several runs on one page, with their curves in the same panels and their different arguments:

    python recipes/report.py --runs out/demo out/other --output_file out/compare.html

Recipes write the page of their own run when it ends; this one also works for a run in progress or stopped.
"""

from pathlib import Path

from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.options import Location, arguments, option
from hfllm.report import read_run, write_comparison, write_page
from hfllm.report.page import PAGE_FILE


@arguments
class ReportArguments(groups.Config):
    runs: list[str] = option(
        help="Folders of runs (their output_dir); two or more are compared.", location=Location.READ
    )
    output_file: str | None = option(
        None,
        help="File of the page.",
        default_is="report.html in the run's folder, or compare.html here",
        location=Location.WRITTEN,
    )


def main(args: ReportArguments) -> None:
    runs = [read_run(folder) for folder in args.runs]
    if len(runs) == 1:
        page = write_page(runs[0], args.output_file or Path(args.runs[0]).expanduser() / PAGE_FILE)
    else:
        page = write_comparison(runs, args.output_file or "compare.html")
    print(f"{page}, {page.stat().st_size / 1024:,.0f} KiB: open it in a browser.")


if __name__ == "__main__":
    run(main, ReportArguments, description=__doc__)
