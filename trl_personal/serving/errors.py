"""Errors as OpenAI's clients read them: a status, and a body that says what was wrong."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .interface import EngineError, RequestError


TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """
    A request that is answered with an error.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What is wrong and what to do. It must not hold what the client sent: proxies log bodies of errors.
        code (`str`, *optional*): A word for programs.
        param (`str`, *optional*): The field that is wrong.
        headers (`dict`, *optional*): More headers, such as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """
    The body of an error.

    ```python
    >>> error_body(403, "No.")
    {'error': {'message': 'No.', 'type': 'permission_error', 'param': None, 'code': None}}
    ```
    """
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, EngineError):
        return ApiError(500, str(error))
    if isinstance(error, TimeoutError):
        return ApiError(504, "The answer was not ready in time. Ask for fewer tokens, or try again later.", "timeout")
    return ApiError(500, "The server failed at this request.")


def describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, without what is in it, and the first field that is."""
    found = []
    for detail in error.errors():
        place = ".".join(str(part) for part in detail["loc"] if part != "body")
        text = detail["msg"].removeprefix("Value error, ")
        found.append(f"{place[:100]}: {text}" if place else text)
    where = next((str(detail["loc"][1]) for detail in error.errors() if len(detail["loc"]) > 1), None)
    return f"The request is not valid. {'; '.join(found[:5])}"[:1000], where and where[:100]


def add_error_handlers(app: FastAPI) -> None:
    """Let each error leave in one form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            message, param = describe_validation(error)
            return JSONResponse(error_body(400, message, param=param), 400)
        if isinstance(error, HTTPException):
            message = error.detail if error.detail != HTTPStatus(error.status_code).phrase else f"{error.detail}."
            return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)
        told = as_api_error(error)
        return JSONResponse(error_body(told.status, told.message, told.code, told.param), told.status, told.headers)

    for kind in (ApiError, RequestError, EngineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
