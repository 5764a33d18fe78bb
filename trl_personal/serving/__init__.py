"""
Answers over HTTP for many users: routes, keys, limits and metrics in front of an [`~serving.interface.Engine`].

It imports the standard library, torch, safetensors and FastAPI (with what that brings) only, so that it also runs beside an
engine that wants other versions of transformers than the rest of this package.
"""
