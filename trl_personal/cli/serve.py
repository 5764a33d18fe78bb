"""`trl-personal serve`: a server for the users of a trained model."""

from argparse import Namespace
from dataclasses import fields

from .model_folder import check_model_name
from .quantization import quantization_config


def run_serve(arguments: Namespace) -> None:
    """Check what can be checked at once, load the model, serve."""
    try:
        from ..serving.gate import Limits
        from ..serving.keys import KeyFile
        from ..serving.run import open_socket, run_server
    except ModuleNotFoundError as error:
        raise ValueError(
            f"`serve` needs {error.name}, which is not installed: `pip install trl-personal[serve]`."
        ) from error
    check_model_name(arguments.model)
    keys = None if arguments.keys is None else KeyFile(arguments.keys)
    limits = Limits(**{f.name: vars(arguments)[f.name] for f in fields(Limits) if f.name in vars(arguments)})
    with open_socket(arguments.host, arguments.port, keys) as listener:  # before the model, whose loading takes long
        from ..engine.loading import load_engine

        engine = load_engine(
            arguments.model,
            name=arguments.name,
            plain=arguments.no_users,
            ref_model=arguments.ref_model,
            max_rows=arguments.max_rows,
            max_batch_tokens=arguments.max_batch_tokens,
            dtype=arguments.dtype,
            device_map=arguments.device_map,
            quantization_config=quantization_config(arguments),
        )
        run_server(engine, listener, keys, limits)
