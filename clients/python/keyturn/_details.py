"""The standard error details of google.rpc, read by field number.

Their generated classes come with googleapis-common-protos, which this package does without. They
are declared here in a pool and under names of their own, so that nothing clashes in a process that
loads those too.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "keyturn.details"
# The fields of each message, numbered from 1: `name` is a string, `name:type` a number or one of
# the messages, `name:type*` a list. A map is on the wire a list of entries.
_MESSAGES = {
    "Entry": "key value",
    "ErrorInfo": "reason domain metadata:Entry*",
    "FieldViolation": "field description",
    "BadRequest": "field_violations:FieldViolation*",
    "Duration": "seconds:int64 nanos:int32",
    "RetryInfo": "retry_delay:Duration",
    "ResourceInfo": "resource_type resource_name owner description",
}


def _declare() -> descriptor_pool.DescriptorPool:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="keyturn/details.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for number, spec in enumerate(fields.split(), start=1):
            name, _, kind = spec.partition(":")
            field = declared.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.endswith("*"):
                field.label = kinds.LABEL_REPEATED
            match kind.rstrip("*"):
                case "":
                    field.type = kinds.TYPE_STRING
                case "int64":
                    field.type = kinds.TYPE_INT64
                case "int32":
                    field.type = kinds.TYPE_INT32
                case other:
                    field.type = kinds.TYPE_MESSAGE
                    field.type_name = f".{_PACKAGE}.{other}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_POOL = _declare()


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


ErrorInfo = _message("ErrorInfo")
BadRequest = _message("BadRequest")
RetryInfo = _message("RetryInfo")
ResourceInfo = _message("ResourceInfo")
