"""/v1/fine_tuning/jobs: create, retrieve, list, cancel, pause, resume, events and checkpoints."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request

from veneer.errors import DataError
from veneer.serve.api.context import ApiContext
from veneer.serve.api.errors import ApiError, invalid, not_found
from veneer.serve.api.parameters import MAX_METADATA, JobRequest, JsonRoute, PageQuery
from veneer.serve.api.routes.files import as_page
from veneer.serve.api.routes.models import NO_RETRY
from veneer.serve.jobs.options import hyperparameters_of, job_options
from veneer.serve.store.jobs import OVER, Creation
from veneer.training.run.setup import context_of, load_data

CHECKED_BYTES = 8 << 20
"""Files up to this size are checked before a job is created; larger ones when it starts."""
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


def fine_tuning_routes(context: ApiContext) -> APIRouter:
    """The routes of jobs."""
    router = APIRouter(route_class=JsonRoute)
    jobs = context.jobs

    @router.post("/v1/fine_tuning/jobs")
    def create_job(request: Request, parameters: JobRequest) -> dict[str, Any]:
        return _shown(context, _create(context, request, parameters))

    @router.get("/v1/fine_tuning/jobs")
    def list_jobs(request: Request) -> dict[str, Any]:
        query, metadata = _list_query(request)
        return as_page(
            jobs.page(metadata, after=query.after, limit=query.limit), lambda row: _shown(context, row), query.after
        )

    @router.get("/v1/fine_tuning/jobs/{job_id}")
    def retrieve_job(job_id: str) -> dict[str, Any]:
        return _shown(context, _job(context, job_id))

    @router.get("/v1/fine_tuning/jobs/{job_id}/events")
    def list_events(job_id: str, query: Annotated[PageQuery, Query()]) -> dict[str, Any]:
        _job(context, job_id)
        after = None
        if query.after is not None:
            number = re.fullmatch(rf"ftevent-{re.escape(job_id)}-(\d{{1,12}})", query.after)
            if number is None:
                raise invalid(f"after: there is no event {query.after[:80]!r} of this job", "after", "not_found")
            after = int(number.group(1))
        return as_page(jobs.events(job_id, after=after, limit=query.limit), _shown_event, query.after)

    @router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
    def list_checkpoints(job_id: str, query: Annotated[PageQuery, Query()]) -> dict[str, Any]:
        job = _job(context, job_id)
        page = jobs.checkpoints(job_id, after=query.after, limit=query.limit)
        return as_page(page, lambda row: _shown_checkpoint(job, row), query.after)

    @router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
    def cancel_job(job_id: str) -> dict[str, Any]:
        return _move(context, job_id, "cancelled", "The job was cancelled")

    @router.post("/v1/fine_tuning/jobs/{job_id}/pause")
    def pause_job(job_id: str) -> dict[str, Any]:
        return _move(context, job_id, "paused", "The job was paused")

    @router.post("/v1/fine_tuning/jobs/{job_id}/resume")
    def resume_job(job_id: str) -> dict[str, Any]:
        if _job(context, job_id)["status"] != "paused":
            raise _conflict(_job(context, job_id), "resumed")
        return _move(context, job_id, "queued", "The job was resumed")

    return router


def _create(context: ApiContext, request: Request, parameters: JobRequest) -> dict[str, Any]:
    """Check a request and create its job, or find the one that the same request created before."""
    given = parameters.model_dump(exclude_none=True)
    idempotency = request.headers.get("idempotency-key")
    if idempotency is not None and len(idempotency) > 255:
        raise invalid("the Idempotency-Key header is longer than 255 characters", "Idempotency-Key")
    retried = re.fullmatch(r"0*[1-9][0-9]*", request.headers.get("x-stainless-retry-count", "0")) is not None
    creation = Creation(
        caller=request.scope["caller"],
        body=hashlib.sha256(orjson.dumps(given, option=orjson.OPT_SORT_KEYS)).hexdigest(),
        idempotency_key=idempotency,
        retried=retried,
        arrived=time.time(),
    )
    known, other_body = context.jobs.repeated(creation)
    if other_body:
        raise ApiError(
            409, "the Idempotency-Key was used for another request", code="idempotency_key_reused", headers=NO_RETRY
        )
    if known is not None:
        return known
    waiting = len(context.jobs.with_status("validating_files", "queued", "running", "paused"))
    if waiting >= context.limits.max_jobs:
        raise ApiError(429, f"there are {waiting} jobs already", code="too_many_jobs", headers={"retry-after": "60"})
    checked = _check(context, parameters, given)
    job = context.jobs.create(
        creation,
        request=given,
        suffix=parameters.suffix,
        training_file=parameters.training_file,
        validation_file=parameters.validation_file,
        seed=parameters.seed or 0,
        metadata=parameters.metadata or {},
        checked=checked,
    )
    context.queue.wake()
    return job


def _check(context: ApiContext, parameters: JobRequest, given: dict[str, Any]) -> bool:
    """Check the options and, unless they are large, the files of a job; returns whether the files were read.

    Raises:
        ApiError, RequestError: a file does not exist or has rows that cannot be trained (with the report), or an option is invalid.
    """
    if parameters.suffix is not None and re.fullmatch(r".*\.step-\d+", parameters.suffix):
        raise invalid("suffix: names that end like .step-1 are those of checkpoints", "suffix")
    paths: dict[str, Path | None] = {}
    size = 0
    for param in ("training_file", "validation_file"):
        file_id = getattr(parameters, param)
        if file_id is None:
            paths[param] = None
            continue
        row = context.files.get(file_id)
        if row is None:
            raise invalid(f"{param}: there is no file {file_id[:80]!r}", param, "file_not_found")
        if row["purpose"] != "fine-tune":
            raise invalid(f"{param}: expected a file for fine-tune, found one for {row['purpose']}", param)
        paths[param], size = context.files.path(row), size + row["bytes"]
    data, valid = paths["training_file"], paths["validation_file"]
    assert data is not None
    options = job_options(
        given,
        name=parameters.suffix or "ft",
        base=context.base,
        data=data,
        valid=valid,
        start=context.registry.folder_of(parameters.model),
        out=context.queue.folder / "unused",
        seed=parameters.seed or 0,
    )
    if size > CHECKED_BYTES:
        return False
    try:
        load_data(options, context.base, context_of(context.base))
    except DataError as error:
        param = "validation_file" if valid is not None and valid.name in str(error) else "training_file"
        raise invalid(_without_folders(str(error), context), param, "invalid_training_file") from None
    return True


def _without_folders(text: str, context: ApiContext) -> str:
    """A report without the folder of the files, which is the server's own business."""
    return text.replace(f"{context.files.folder}/", "")


def _list_query(request: Request) -> tuple[PageQuery, dict[str, str]]:
    """The page and the metadata that a list of jobs is asked for."""
    metadata, rest = {}, {}
    for key, value in request.query_params.multi_items():
        match = _METADATA.fullmatch(key)
        if match is not None:
            if '"' in match.group(1) or "\\" in match.group(1):
                raise invalid("metadata: quotes cannot be searched for", "metadata")
            metadata[match.group(1)] = value
            if len(metadata) > MAX_METADATA:
                raise invalid(f"metadata: expected at most {MAX_METADATA} keys", "metadata")
        elif key in rest or key not in ("after", "limit", "metadata"):
            raise invalid(f"unknown parameter {key[:80]!r}", key[:80], "unknown_parameter")
        elif key != "metadata":
            rest[key] = value
    limit = rest.pop("limit", "20")
    if not (re.fullmatch(r"[0-9]{1,9}", limit) and 1 <= int(limit) <= 100):
        raise invalid(f"limit: expected a number from 1 to 100, found {limit[:40]!r}", "limit")
    return PageQuery(after=rest.get("after"), limit=int(limit)), metadata


def _job(context: ApiContext, job_id: str) -> dict[str, Any]:
    job = context.jobs.get(job_id)
    if job is None:
        raise not_found("fine-tuning job", job_id, "fine_tuning_job_id")
    return job


def _move(context: ApiContext, job_id: str, status: str, message: str) -> dict[str, Any]:
    _job(context, job_id)
    if not context.jobs.move(job_id, status, message):
        raise _conflict(_job(context, job_id), status)
    context.queue.wake()
    return _shown(context, _job(context, job_id))


def _conflict(job: dict[str, Any], wanted: str) -> ApiError:
    return ApiError(
        409, f"the job is {job['status']} and cannot be {wanted}", code="invalid_job_status", headers=NO_RETRY
    )


def _shown(context: ApiContext, job: dict[str, Any]) -> dict[str, Any]:
    """A job as clients see it."""
    request = json.loads(job["request"])
    hyperparameters = {"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"}
    hyperparameters |= hyperparameters_of(request)
    left = (job["steps"] or 0) - job["step"]
    finish = int(time.time() + left * job["seconds"]) if job["status"] == "running" and job["seconds"] else None
    return {
        "id": job["id"],
        "object": "fine_tuning.job",
        "created_at": job["created_at"],
        "finished_at": job["finished_at"],
        "estimated_finish": finish,
        "status": job["status"],
        "model": request["model"],
        "fine_tuned_model": job["name"] if job["status"] == "succeeded" else None,
        "organization_id": "veneer",
        "training_file": job["training_file"],
        "validation_file": job["validation_file"],
        "result_files": [] if job["result_file"] is None else [job["result_file"]],
        "trained_tokens": job["trained_tokens"] if job["status"] in OVER else None,
        "seed": job["seed"],
        "metadata": json.loads(job["metadata"]) or None,
        "error": None if job["error"] is None else _error(context, job["error"]),
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "integrations": [],
        "adapter": request.get("adapter"),
        "training": request.get("training"),
        "user_provided_suffix": request.get("suffix"),
    }


def _error(context: ApiContext, stored: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(stored)
    return {**error, "message": _without_folders(error["message"], context)}


def _shown_event(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event['job']}-{event['seq']}",
        "object": "fine_tuning.job.event",
        "created_at": event["created_at"],
        "level": event["level"],
        "message": event["message"],
        "type": event["type"],
        "data": json.loads(event["data"]),
    }


def _shown_checkpoint(job: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "object": "fine_tuning.job.checkpoint",
        "created_at": row["created_at"],
        "fine_tuned_model_checkpoint": f"{job['name']}:step-{row['step']}",
        "fine_tuning_job_id": job["id"],
        "step_number": row["step"],
        "metrics": json.loads(row["metrics"]),
    }
