"""/v1/files: upload, list, retrieve, content and delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException

from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import ApiError, invalid, not_found
from veneer.serve.api.parameters import FilesQuery
from veneer.serve.api.routes.models import NO_RETRY
from veneer.serve.store.files import TooLargeError

PURPOSES = ("fine-tune",)
_FIELDS = ("file", "purpose", "expires_after[anchor]", "expires_after[seconds]")


def file_routes(context: ApiContext) -> APIRouter:
    """The routes of files."""
    router = APIRouter()
    files = context.files

    @router.post("/v1/files")
    async def create_file(request: Request) -> dict[str, Any]:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("expected a form (multipart/form-data) with file and purpose", "file", "invalid_form")
        try:
            async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
                return shown_file(await _received(context, form))
        except MultiPartException as error:
            raise invalid(f"the form cannot be read: {error.message}", "file", "invalid_form") from None

    @router.get("/v1/files")
    def list_files(query: Annotated[FilesQuery, Query()]) -> dict[str, Any]:
        page = files.page(query.purpose, after=query.after, limit=query.limit, ascending=query.order == "asc")
        return as_page(page, shown_file, query.after)

    @router.get("/v1/files/{file_id}")
    def retrieve_file(file_id: str) -> dict[str, Any]:
        return shown_file(_row(context, file_id))

    @router.get("/v1/files/{file_id}/content")
    def file_content(file_id: str) -> Response:
        path = files.path(_row(context, file_id))
        # No filename: the name is the client's, and the answer is never shown as a page.
        headers = {"content-disposition": "attachment", "x-content-type-options": "nosniff"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}")
    def delete_file(file_id: str) -> dict[str, Any]:
        _row(context, file_id)
        if files.in_use(file_id):
            raise ApiError(
                409,
                f"{file_id} is used by a job that is not over; cancel the job first",
                code="in_use",
                headers=NO_RETRY,
            )
        files.delete(file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


async def _received(context: ApiContext, form: FormData) -> dict[str, Any]:
    """Store the file of a form."""
    for name in form:
        if name not in _FIELDS:
            raise invalid(f"unknown parameter {name[:80]!r}", name[:80], "unknown_parameter")
    upload, purpose = form.get("file"), form.get("purpose")
    if not isinstance(upload, UploadFile):
        raise invalid("file is missing", "file", "missing_parameter")
    if purpose not in PURPOSES:
        raise invalid(f"purpose: expected {', '.join(PURPOSES)}", "purpose")

    limits = context.limits
    try:
        return await run_in_threadpool(
            context.files.receive,
            upload.file,
            filename=upload.filename or "file",
            purpose=str(purpose),
            limit=limits.max_file_bytes,
            total_limit=limits.max_files_bytes,
            expires_after=_expires(form),
        )
    except TooLargeError as error:
        raise ApiError(413, f"file: {error}", param="file", code="too_large") from None


def _expires(form: FormData) -> int | None:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise invalid("expires_after.anchor: expected created_at", "expires_after.anchor")
    text = str(seconds)
    if not (text.isascii() and text.isdecimal() and 3600 <= int(text) <= 2_592_000):
        raise invalid(f"expires_after.seconds: expected 3600 to 2592000, found {text[:40]}", "expires_after.seconds")
    return int(text)


def _row(context: ApiContext, file_id: str) -> dict[str, Any]:
    row = context.files.get(file_id)
    if row is None:
        raise not_found("file", file_id, "file_id")
    return row


def shown_file(row: dict[str, Any]) -> dict[str, Any]:
    """A file as clients see it."""
    keys = ("id", "filename", "purpose", "bytes", "created_at", "expires_at")
    return {**{key: row[key] for key in keys}, "object": "file", "status": "processed", "status_details": None}


def as_page(page: tuple[list[Any], bool] | None, shown: Any, after: str | None) -> dict[str, Any]:
    """A page of a list. Raises ApiError if it was to begin after something that does not exist."""
    if page is None:
        raise invalid(f"after: there is nothing with the id {(after or '')[:80]!r} in this list", "after", "not_found")
    rows, more = page
    entries = [shown(row) for row in rows]
    ends = (
        {"first_id": entries[0]["id"], "last_id": entries[-1]["id"]} if entries else {"first_id": None, "last_id": None}
    )
    return {"object": "list", "data": entries, "has_more": more, **ends}
