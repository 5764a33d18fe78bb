"""Takes users out of a model's folder: every trace of them, with a certificate of what was done."""

from .certificate import verify_certificate
from .folder import remove_from_folder


__all__ = ["remove_from_folder", "verify_certificate"]
