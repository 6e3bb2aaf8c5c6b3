"""The words of the command line. Heavy modules load only in the command that needs them, so `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

__all__ = ["app", "run"]

app = typer.Typer(
    name="funnelrec",
    help="From an events table to a recommender: content -> match -> rank -> rerank.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at and prepare data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

STOPPED = (130, 143)  #: by SIGINT or SIGTERM, after the step was done and saved

Events = Annotated[
    str,
    typer.Argument(
        help="A table (CSV, Parquet, Arrow), or a source: movielens[:PATH], movielens-100k[:PATH], frappe:PATH, "
        "criteo:PATH, simulate."
    ),
]
Items = Annotated[Path | None, typer.Option(help="The items table.")]
Users = Annotated[Path | None, typer.Option(help="The users table.")]
SchemaFile = Annotated[
    Path | None, typer.Option("--schema", help="A schema as JSON; without it the columns are guessed.")
]
Split = Annotated[str, typer.Option(help="time: by global time; legacy: leave-last-out; ratio: random rows.")]
BadRows = Annotated[int, typer.Option(min=0, help="How many bad rows to set aside before giving up.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]
Progress = Annotated[bool, typer.Option(help="A bar while training.")]


def run(arguments: list[str]) -> int:
    """Run one command and give its exit code: 0, or 2 after one line that says what was wrong and how to mend it."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        app(arguments)
    except SystemExit as done:  # how typer ends, also after it showed what was wrong with the words
        code = done.code if isinstance(done.code, int) else 0
        if code in STOPPED:
            Console(stderr=True, highlight=False).print(
                "funnelrec: stopped and saved; the same command goes on from here"
            )
        return code
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"funnelrec: {error}", markup=False)
        return 2
    return 0


@app.command()
def demo(
    out: Out = Path("demo.funnel"),
    seed: Annotated[int, typer.Option(help="Of the world and the training.")] = 0,
    users: Annotated[int, typer.Option(min=50, help="People of the simulated world.")] = 3000,
    items: Annotated[int, typer.Option(min=80, help="Items of the simulated world.")] = 2000,
    progress: Progress = True,
) -> None:
    """Build a small simulated world, train the whole funnel on it, and hold it against the truth."""
    from funnelrec.cli.demo import run_demo

    run_demo(out, seed=seed, users=users, items=items, progress=progress)


@app.command()
def fit(
    events: Events,
    out: Out,
    items: Items = None,
    users: Users = None,
    schema: SchemaFile = None,
    split: Split = "time",
    match: Annotated[
        str, typer.Option(help="Matchers to train, e.g. 'sasrec,comirec_sa(num_interests=4)'.")
    ] = "sasrec",
    rank: Annotated[str, typer.Option(help="Rankers to train, or none.")] = "din",
    rerank: Annotated[str, typer.Option(help="The reranker, or none.")] = "diversity",
    diversity_field: Annotated[str | None, typer.Option(help="The item field that variety is measured on.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many; early stopping may end before.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Epochs without a new best before stopping.")] = None,
    max_len: Annotated[int, typer.Option(min=1, help="Longest history that is read.")] = 50,
    candidates: Annotated[int, typer.Option(min=1, help="Items that match hands to rank.")] = 500,
    seed: int = 0,
    item_map: Annotated[bool, typer.Option("--map", help="Lay the items out for the map of the page.")] = False,
    content: Annotated[
        bool, typer.Option("--content", help="Join items to their texts and categories, so that new ones can be added.")
    ] = False,
    max_bad_rows: BadRows = 0,
    progress: Progress = True,
    resume: Annotated[bool, typer.Option(help="Go on with the training that the folder holds, or begin anew.")] = True,
) -> None:
    """Train a funnel on your events, compare it with the baselines, and write it with its report."""
    from funnelrec.cli.fit import Plan, fit_funnel
    from funnelrec.workflow import Training

    training = Training(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        patience=patience,
        max_len=max_len,
        seed=seed,
        progress=progress,
        resume=resume,
    )
    plan = Plan.parse(
        match=match,
        rank=rank,
        rerank=rerank,
        diversity_field=diversity_field,
        candidates=candidates,
        item_map=item_map,
        content=content,
    )
    tables = _load(events, items, users, schema, max_bad_rows)
    fit_funnel(tables, out, plan, training, split=split)


@app.command()
def finetune(
    source: Annotated[Path, typer.Argument(help="A folder of pictures a class, a CSV table, or a MedMNIST .npz.")],
    out: Out,
    encoder: Annotated[str, typer.Option(help="resnet18, densenet121, vgg16, alexnet, lenet …")] = "resnet18",
    weights: Annotated[Path | None, typer.Option(help="A checkpoint of torchvision's or timm's, safetensors.")] = None,
    frozen: Annotated[bool, typer.Option(help="Only the head learns.")] = False,
    size: Annotated[int, typer.Option(min=8, help="Side to which pictures are scaled, in pixels.")] = 224,
    width: Annotated[int | None, typer.Option(min=1, help="A narrower network.")] = None,
    grey: Annotated[bool, typer.Option(help="One channel.")] = False,
    patient: Annotated[str | None, typer.Option(help="CSV column; a patient's pictures stay in one part.")] = None,
    label: Annotated[str, typer.Option(help="CSV column of the class.")] = "label",
    image: Annotated[str, typer.Option(help="CSV column of the file.")] = "image",
    part: Annotated[str | None, typer.Option(help="CSV column of train, val or test.")] = None,
    bad: Annotated[str, typer.Option(help="Faulty files: skip, refuse, or use where they can be mended.")] = "skip",
    flip: Annotated[bool, typer.Option(help="Mirrored pictures are as good.")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    seed: int = 0,
    progress: Progress = True,
) -> None:
    """Train a classifier of pictures, hold it against pictures it has not seen, and write it with its report."""
    from funnelrec.cli.finetune import FineTuning, read_pictures, say
    from funnelrec.cli.finetune import finetune as run_finetune

    columns = {"patient": patient, "label": label, "image": image, "part": part}
    images = read_pictures(source, size=size, grey=grey, bad=bad, to=out / "pixels", columns=columns)
    how = FineTuning(
        encoder=encoder, width=width, weights=weights, frozen=frozen, epochs=epochs, batch_size=batch_size, lr=lr,
        flip=flip, seed=seed, progress=progress,
    )  # fmt: skip
    say(run_finetune(images, out, how), out)


@app.command()
def compare(
    events: Events,
    out: Out,
    rank: Annotated[str, typer.Option(help="Rankers, e.g. 'din,din(softmax=True),deepfm', or none.")] = "none",
    match: Annotated[str, typer.Option(help="Matchers, or none.")] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each model.")] = 3,
    items: Items = None,
    users: Users = None,
    schema: SchemaFile = None,
    split: Split = "time",
    epochs: Annotated[int | None, typer.Option(min=1, help="At most so many; early stopping may end before.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    patience: Annotated[int | None, typer.Option(min=1, help="Epochs without a new best before stopping.")] = None,
    max_len: Annotated[int, typer.Option(min=1, help="Longest history that is read.")] = 50,
    max_bad_rows: BadRows = 0,
    progress: Progress = True,
) -> None:
    """Train models side by side over several seeds; mean, deviation, interval, and a test against the best baseline."""
    from funnelrec.cli.compare import compare as run_compare
    from funnelrec.cli.compare import named_choices
    from funnelrec.workflow import Training

    training = Training(
        epochs=epochs, batch_size=batch_size, lr=lr, patience=patience, max_len=max_len, progress=progress
    )
    chosen = {stage: named_choices(text, stage) for stage, text in (("match", match), ("rank", rank))}
    tables = _load(events, items, users, schema, max_bad_rows)
    run_compare(tables, out, match=chosen["match"], rank=chosen["rank"], seeds=seeds, training=training, split=split)


@app.command()
def evaluate(folder: Annotated[Path, typer.Argument(help="A folder that `fit` or `demo` wrote.")]) -> None:
    """Measure a funnel again on the test part of the data it was fitted with."""
    from funnelrec.cli.fit import evaluate_folder

    evaluate_folder(folder)


@app.command()
def recommend(
    folder: Annotated[Path, typer.Argument(help="A funnel.")],
    user: Annotated[str | None, typer.Option(help="A user id.")] = None,
    history: Annotated[str | None, typer.Option(help="Item ids with commas between, newest last; for anyone.")] = None,
    all_users: Annotated[bool, typer.Option("--all-users", help="Everybody, into the Parquet file of --out.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Parquet file for --all-users.")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many.")] = 10,
    where: Annotated[list[str] | None, typer.Option(help="A filter, FIELD=VALUE[,VALUE]; may be repeated.")] = None,
    diversity: Annotated[float | None, typer.Option(min=0, help="The reranker's knob, for this answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    progress: Progress = True,
) -> None:
    """Recommend for a user of the data, for anyone with a history, or for all users into a file."""
    from funnelrec.cli import show
    from funnelrec.serve.funnel import Funnel

    if all_users:
        if user is not None or history is not None or as_json:
            raise ValueError("--all-users answers for everybody into --out; leave out --user, --history and --json")
        if out is None:
            raise ValueError("--all-users writes a Parquet file; name it with -o recs.parquet")
        from funnelrec.cli.bulk import recommend_everybody

        recommend_everybody(folder, out, progress=progress, k=k, filters=_filters(where or []), diversity=diversity)
        return
    if out is not None:
        raise ValueError("--out belongs to --all-users; one answer is printed, as JSON with --json")
    if user is None and history is None:
        raise ValueError("say for whom: --user ID, --history ITEM,ITEM (newest last), or --all-users -o FILE")
    funnel = Funnel.load(folder)
    answer = funnel.recommend(
        user,
        history=None if history is None else [i.strip() for i in history.split(",") if i.strip()],
        k=k,
        filters=_filters(where or []),
        diversity=diversity,
    )
    show.recommendation(answer, as_json=as_json)


@app.command()
def similar(
    folder: Annotated[Path, typer.Argument(help="A funnel.")],
    item: Annotated[str | None, typer.Option(help="An item id: which items are like it?")] = None,
    user: Annotated[str | None, typer.Option(help="A user id: who is like this user?")] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many.")] = 10,
    where: Annotated[list[str] | None, typer.Option(help="A filter on items, FIELD=VALUE[,VALUE].")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Items like an item, or people like a user, by the funnel's matcher."""
    from funnelrec.cli import show
    from funnelrec.serve.funnel import Funnel

    if (item is None) == (user is None):
        raise ValueError("say like what: --item ID or --user ID, one of them")
    if user is not None and where:
        raise ValueError("--where filters items, and --user asks for people; leave one of them out")
    funnel = Funnel.load(folder)
    if item is not None:
        show.recommendation(funnel.similar(item, k=k, filters=_filters(where or [])), as_json=as_json, matched=False)
    elif user is not None:
        show.similar_users(funnel.similar_users(user, k=k), as_json=as_json)


@app.command("map")
def draw(
    folder: Annotated[Path, typer.Argument(help="A funnel.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture, .png or .svg.")] = Path("map.png"),
    colour: Annotated[str | None, typer.Option(help="The item field that the colours show.")] = None,
    user: Annotated[str | None, typer.Option(help="A user id: their interests are drawn among the items.")] = None,
    method: Annotated[Literal["tsne", "umap"], typer.Option(help="How the items are laid out.")] = "tsne",
    seed: int = 0,
) -> None:
    """Draw the items of a funnel so that what is alike lies together."""
    from funnelrec.cli.map import draw_map

    draw_map(folder, out, colour=colour, user=user, method=method, seed=seed)


@app.command("add-items")
def add_items(
    folder: Annotated[Path, typer.Argument(help="A funnel that was fitted with --content.")],
    items: Annotated[
        Path, typer.Argument(help="A table of new items (CSV, Parquet, Arrow) with the catalogue's columns.")
    ],
) -> None:
    """Put new items into a funnel without training: their content places them."""
    from funnelrec.cli import show
    from funnelrec.data.ingest import read_table
    from funnelrec.serve.funnel import Funnel
    from funnelrec.serve.grow import add_items as grow

    funnel = Funnel.load(folder)
    new, _ = read_table(items)
    grown = grow(funnel, new)
    grown.save(folder)
    show.line(f"{folder}: {len(new):,} new items, {grown.store.spec.num_items - 2:,} in all")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A funnel.")],
    out: Out,
) -> None:
    """Write the ranker and the user tower as ONNX, checked against torch on other inputs."""
    from funnelrec.cli import show
    from funnelrec.serve.export import export as run_export
    from funnelrec.serve.funnel import Funnel

    for graph in run_export(Funnel.load(folder), out):
        show.line(f"{out / graph.file}: largest difference to torch {graph.difference:.1e} of the largest value")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A funnel.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token_env: Annotated[str | None, typer.Option(help="The variable that holds the bearer token to ask for.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Other hosts may come without a token.")] = False,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name it goes by; may be repeated.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Questions answered at a time; the cores.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Questions that wait; more are told to come back.")] = 16,
    deadline_ms: Annotated[int, typer.Option(min=1, help="Of a question that names none.")] = 1000,
    spool: Annotated[Path | None, typer.Option(help="The file that events are appended to.")] = None,
    allow_reload: Annotated[bool, typer.Option("--allow-reload", help="Open POST /v1/models/reload.")] = False,
    watch: Annotated[float, typer.Option(min=0, help="Reload when the folder changes; look so often, in seconds.")] = 0,
    drain: Annotated[float, typer.Option(min=0, help="Seconds to go on after SIGTERM before closing.")] = 5,
) -> None:
    """Answer over HTTP, with a page to look at it: recommend, rank, similar, events, metrics."""
    from funnelrec.cli.serve import serve_folder

    serve_folder(
        folder,
        host=host,
        port=port,
        token_env=token_env,
        insecure=insecure,
        threads=threads,
        allow_host=allow_host or [],
        place={"watch_seconds": watch, "drain_seconds": drain},
        queue=queue,
        deadline_ms=deadline_ms,
        spool=spool,
        may_reload=allow_reload,
    )


@app.command()
def models(
    stage: Annotated[str | None, typer.Option(help="match, rank, rerank or encode.")] = None,
) -> None:
    """List the models, their papers and ideas."""
    from funnelrec import zoo
    from funnelrec.cli import show

    show.models([zoo.summary(name) for name in zoo.names(stage)])


@data_app.command("prepare")
def prepare(
    events: Events,
    out: Out,
    items: Items = None,
    users: Users = None,
    schema: SchemaFile = None,
    split: Split = "time",
    max_bad_rows: BadRows = 0,
) -> None:
    """Encode tables into a memory-mapped dataset and account for every row."""
    from funnelrec.cli import show
    from funnelrec.cli.fit import prepare_dataset

    tables = _load(events, items, users, schema, max_bad_rows)
    show.tables(tables)
    show.dataset(prepare_dataset(tables, out, split))


def _load(events: str, items: Path | None, users: Path | None, schema: Path | None, max_bad_rows: int) -> Any:
    """The tables of a path or of "source:path"."""
    from funnelrec.data.sources import criteo, csv, frappe, movielens, simulate

    sources: dict[str, Any] = {
        "movielens": lambda path: movielens.load(path, variant="1m", max_bad_rows=max_bad_rows),
        "movielens-100k": lambda path: movielens.load(path, variant="100k", max_bad_rows=max_bad_rows),
        "frappe": lambda path: frappe.load(path, max_bad_rows=max_bad_rows),
        "criteo": lambda path: criteo.load(path, max_bad_rows=max_bad_rows),
        "simulate": lambda path: simulate.load().tables,
    }
    name, _, path = events.partition(":")
    if name in sources and not Path(events).exists():
        given = [o for o, v in (("--items", items), ("--users", users), ("--schema", schema)) if v is not None]
        if given:
            raise ValueError(f"the source '{name}' brings its own tables and schema; leave out {given[0]}")
        return sources[name](path or None)
    return csv.load(events, users, items, schema=schema, max_bad_rows=max_bad_rows)


def _filters(where: list[str]) -> dict[str, list[str]]:
    filters: dict[str, list[str]] = {}
    for text in where:
        field, sign, values = text.partition("=")
        if not sign or not field or not values:
            raise ValueError(f"a filter is written FIELD=VALUE or FIELD=VALUE,VALUE, received {text!r}")
        if field in filters:
            raise ValueError(f"the filter '{field}' stands twice; write {field}=VALUE,VALUE for items that have either")
        filters[field] = values.split(",")
    return filters
