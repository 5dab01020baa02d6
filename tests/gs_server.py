"""A server that speaks as Google Cloud Storage does: `python gs_server.py PORT BUCKET`.

It is the emulator of PyPI, and what TensorStore needs that it lacks: the generation of what is read, and writes on
the condition that an object is still of a generation.
"""

from __future__ import annotations

import http.server
import sys
import threading
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server  # pyright: ignore[reportMissingImports]
from gcp_storage_emulator.exceptions import NotFound  # pyright: ignore[reportMissingImports]
from gcp_storage_emulator.handlers import objects  # pyright: ignore[reportMissingImports]

_download, _media_upload = objects.download, objects._media_upload


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def download(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
    """Also says which generation it is."""
    _download(request, response, storage, *arguments, **options)
    bucket, name = request.params["bucket_name"], request.params["object_id"]
    response["x-goog-generation"] = _generation(storage, bucket, name)


def media_upload(request: Any, response: Any, storage: Any) -> Any:
    """Refuses to replace an object of another generation than the request says."""
    wanted = request.query.get("ifGenerationMatch")
    if wanted and wanted[0] != _generation(storage, request.params["bucket_name"], request.query["name"][0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
    return _media_upload(request, response, storage)


objects.download, objects._media_upload = download, media_upload
# The emulator serves one connection at a time, and closes it after each answer. Clients with many of them then try
# again after seconds. So connections stay, each with its thread; requests are still answered one at a time.
_answering, _handle = threading.Lock(), server.Router.handle


def handle(router: Any, method: str) -> None:
    """Answers a request when no other one is answered."""
    with _answering:
        _handle(router, method)


http.server.ThreadingHTTPServer.request_queue_size = 128
http.server.HTTPServer = http.server.ThreadingHTTPServer
server.RequestHandler.protocol_version = "HTTP/1.1"
server.RequestHandler.wbufsize = 2**16
setattr(server.Router, "handle", handle)  # noqa: B010 - its type is narrower

if __name__ == "__main__":
    port, bucket = sys.argv[1:]
    server.create_server("127.0.0.1", int(port), in_memory=True, default_bucket=bucket).run()
