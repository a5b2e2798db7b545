"""The desk's application: what the page asks for, over the files of the runs it was given.

Starlette, because this is a dozen addresses with parameters, files and errors, which it does well;
the reward server has two and none of these. Connections and their limits are the same gate's
(`rewards/remote/gate.py`), who may ask is `guard.py`.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from tiltflow.desk import runs
from tiltflow.desk.dial import Dial, view
from tiltflow.desk.guard import Guard
from tiltflow.desk.images import thumbnail
from tiltflow.desk.sets import Choice, Table, group, load_table, look
from tiltflow.desk.sources import Place, Sources, find_sources
from tiltflow.desk.votes import Ballot, Match
from tiltflow.tasks.dial_grid import picture_file
from tiltflow.tasks.sheets import sheet_mark

PAGE = Path(__file__).parent / "page"
LOGS = 64
"""Logs that are kept in memory: the runs that were looked at last."""
LONGEST_NAME = 200
"""Letters of a file's name: a number in an address may have any length."""
BODY = 16_384
"""Bytes of a request's body."""
PATIENCE = 10.0
"""Seconds for a request's body."""


class Json(JSONResponse):
    """In ASCII: a file name that is no text has halves of surrogates, which UTF-8 has not."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Desk:
    """The runs and evaluations under the given paths, looked for anew with every overview, and the
    file that votes go to."""

    def __init__(self, given: Sequence[Path], votes: Path) -> None:
        self.given, self.ballot, self.dial = list(given), Ballot(votes), Dial()
        self.sources: Sources = find_sources(self.given)
        self._logs: OrderedDict[str, runs.Log] = OrderedDict()

    def overview(self) -> dict[str, Any]:
        """Every run and every set of comparable evaluations, in short, and what cannot be read."""
        self.sources = find_sources(self.given, strict=False)
        problems: list[str] = []
        listed = []
        for place in self.sources.runs.values():
            try:
                about = runs.summary(place.path)
            except OSError as error:  # another user's, say
                problems.append(f"{place.name}: {error.strerror or error}")
            else:
                listed.append({"id": place.id, "name": place.name, **about})
        sets = [
            {"id": key, "name": found.name, "changed": found.changed}
            for key, found in group(self.sources.evaluations, problems).items()
        ]
        dials = [{"id": place.id, "name": place.name} for place in self.sources.dials.values()]
        return {"runs": listed, "sets": sets, "dials": dials, "problems": problems}

    def run(self, id: str) -> Place:
        """Raises KeyError if there is none of that id."""
        return self.sources.runs[id]

    def view(self, id: str) -> dict[str, Any]:
        """A run in full."""
        place = self.run(id)
        log = self._logs.pop(id, None) or runs.Log(place.path / "metrics.jsonl")
        self._logs[id] = log
        while len(self._logs) > LOGS:
            self._logs.popitem(last=False)
        return {"id": id, "name": place.name, **runs.view(place.path, log)}

    def table(self, id: str) -> Table:
        """A set of comparable evaluations. Raises KeyError if there is none of that id."""
        return load_table(group(self.sources.evaluations)[id])


def make_app(desk: Desk, host: str, port: int, token: str) -> ASGIApp:
    """The application behind its guard."""
    answers = Answers(desk)
    routes = [
        Route("/", answers.page),
        Route("/api/overview", answers.overview),
        Route("/api/run/{id}", answers.run),
        Route("/api/run/{id}/sample/{step:int}", answers.sample),
        Route("/api/set/{id}", answers.set),
        Route("/api/set/{id}/rows", answers.rows),
        Route("/api/set/{id}/image/{system:path}/{row:int}", answers.image),
        Route("/api/pair", answers.pair, methods=["POST"]),
        Route("/api/pair/{pair}/{side}", answers.pair_image),
        Route("/api/vote", answers.vote, methods=["POST"]),
        Route("/api/dial/load", answers.dial_load, methods=["POST"]),
        Route("/api/dial/image", answers.dial_image, methods=["POST"]),
        Route("/api/dial/scores", answers.dial_scores, methods=["POST"]),
        Route("/api/dial/picture/{key}", answers.dial_picture),
        Route("/api/computed/{id}", answers.computed),
        Route("/api/computed/{id}/{prompt:int}/{seed:int}/{strength:int}", answers.computed_image),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    handlers = {
        KeyError: _missing,
        FileNotFoundError: _missing,  # removed since the desk looked
        NotADirectoryError: _missing,
        ValueError: _wrong,
        OSError: _failed,
        HTTPException: _refused,
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, port, token)


class Answers:
    """One method an address. Those that read files are plain functions, which Starlette calls in
    threads."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def page(self, request: Request) -> Response:
        return FileResponse(PAGE / "index.html", media_type="text/html")

    def overview(self, request: Request) -> Response:
        return Json(self.desk.overview())

    def run(self, request: Request) -> Response:
        return Json(self.desk.view(request.path_params["id"]))

    def sample(self, request: Request) -> Response:
        run = self.desk.run(request.path_params["id"]).path
        drawn = request.query_params.get("drawn")
        return _picture(request, runs.sample_file(run, request.path_params["step"], drawn))

    def set(self, request: Request) -> Response:
        table = self.desk.table(request.path_params["id"])
        return Json(
            {
                "systems": [column.name for column in table.columns],
                "images": [column.images.is_dir() for column in table.columns],
                "rewards": table.rewards,
                "categories": sorted({c for c in table.categories if c is not None}),
                "prompts": len(table.prompts),
            }
        )

    def rows(self, request: Request) -> Response:
        table = self.desk.table(request.path_params["id"])
        return Json(look(table, _choice(request.query_params)))

    def image(self, request: Request) -> Response:
        """By the system's name: columns change places when an evaluation comes or goes."""
        asked = request.path_params
        column = self.desk.table(asked["id"]).column(asked["system"])
        return _picture(request, column.image(asked["row"]))

    async def pair(self, request: Request) -> Response:
        """A new pair of images for a vote."""
        asked = await read_body(request)
        match = Match(*(_text(asked, key) for key in ("set", "a", "b")))
        return Json(await run_in_threadpool(self._draw, match))

    def pair_image(self, request: Request) -> Response:
        pair, side = request.path_params["pair"], request.path_params["side"]
        return _picture(request, self.desk.ballot.image(pair, side))

    async def vote(self, request: Request) -> Response:
        """One vote, answered with the next pair."""
        said = await read_body(request)
        key, choice = _text(said, "pair"), _text(said, "choice")
        match = await run_in_threadpool(self.desk.ballot.vote, key, choice)
        return Json(await run_in_threadpool(self._draw, match))

    async def dial_load(self, request: Request) -> Response:
        """Loads the student of some runs."""
        asked = await read_body(request)
        ids, side = asked.get("runs"), asked.get("side")
        if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
            raise ValueError("runs is a list of ids")
        if side is not None and type(side) is not int:
            raise ValueError("side is a whole number of pixels")
        runs = [self.desk.run(id) for id in ids]
        return Json(await run_in_threadpool(self.desk.dial.load, runs, side))

    async def dial_image(self, request: Request) -> Response:
        asked = await read_body(request)
        return Json(await run_in_threadpool(self.desk.dial.image, asked))

    async def dial_scores(self, request: Request) -> Response:
        asked = await read_body(request)
        return Json(await run_in_threadpool(self.desk.dial.scores, asked))

    def dial_picture(self, request: Request) -> Response:
        return Response(self.desk.dial.picture(request.path_params["key"]), media_type="image/png")

    def computed(self, request: Request) -> Response:
        """A dial that was computed beforehand."""
        return Json(view(self.desk.sources.dials[request.path_params["id"]].path))

    def computed_image(self, request: Request) -> Response:
        asked = request.path_params
        folder = self.desk.sources.dials[asked["id"]].path
        return _picture(
            request, picture_file(folder, asked["prompt"], asked["seed"], asked["strength"])
        )

    def _draw(self, match: Match) -> dict[str, Any]:
        return self.desk.ballot.draw(match, self.desk.table(match.set))


def _text(found: Mapping[str, Any], key: str) -> str:
    """Raises ValueError if a body has no text of that name."""
    value = found.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} is a text")
    return value


def _choice(asked: Mapping[str, str]) -> Choice:
    """Raises ValueError if the query of a page of rows is none."""
    systems = json.loads(asked["systems"]) if "systems" in asked else None
    plain = isinstance(systems, list) and all(isinstance(s, str) for s in systems)
    if systems is not None and not plain:
        raise ValueError("systems is a list of names")
    page = int(asked.get("page", "0"))
    if not 0 <= page < 10**6:
        raise ValueError("there is no such page")
    return Choice(
        asked.get("reward", ""),
        asked.get("baseline", ""),
        None if systems is None else tuple(systems),
        asked.get("category"),
        asked.get("order") == "differ",
        page,
    )


def _picture(request: Request, file: Path) -> Response:
    """A file's image: small with ?side=PIXELS, else the file itself. A browser keeps it for as
    long as the file is the same one."""
    if len(file.name) > LONGEST_NAME or not file.is_file():
        raise KeyError(file.name)
    side = request.query_params.get("side")
    tag = f'"{sheet_mark(file)}-{side}"'
    kept = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=kept)
    if side is None:
        return FileResponse(file, media_type="image/png", headers=kept)
    if not side.isascii() or not side.isdigit() or len(side) > 4:
        raise ValueError("side is a number of pixels")
    return Response(thumbnail(file, int(side)), media_type="image/webp", headers=kept)


async def read_body(request: Request) -> dict[str, Any]:
    """The JSON object that a request carries.

    Raises:
        ValueError: if it is none, longer than `BODY` or not there within `PATIENCE`.
    """
    body = b""
    try:
        async with asyncio.timeout(PATIENCE):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY:
                    raise ValueError("what is written here is short")
        found = json.loads(body)
    except TimeoutError:
        raise ValueError("the body of the request did not come in time") from None
    except RecursionError:
        raise ValueError("the body is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("what is written here is a JSON object")
    return found


async def _missing(request: Request, error: Exception) -> Response:
    return Json({"error": "there is no such thing here (any more)"}, 404)


async def _wrong(request: Request, error: Exception) -> Response:
    return Json({"error": str(error)[:500]}, 422)


async def _failed(request: Request, error: Exception) -> Response:
    said = error.strerror if isinstance(error, OSError) else None
    return Json({"error": f"a file cannot be read or written: {said or error}"[:500]}, 500)


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return Json({"error": "there is nothing at this address"}, status)
