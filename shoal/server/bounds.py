"""Bounds in request models whose values the operator decides: named in the model, looked up when a body is read."""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from shoal.server.limits import RequestLimits


@dataclass(frozen=True)
class Bound:
    """The annotation of a bounded field: `Annotated[list[Tool], Bound("max_tools", "maxItems")]`."""

    limit: str
    """A field of `RequestLimits`."""
    keyword: str
    """JSON Schema's word for it: maxItems, maxLength, maxProperties or maximum."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), self.keyword: {"limit": self.limit}}

    def _check(self, value: Any, info: ValidationInfo) -> Any:
        limits = info.context if isinstance(info.context, RequestLimits) else RequestLimits()
        most = getattr(limits, self.limit)
        if self.limit.endswith("_bytes"):
            size = len(value.encode("utf-8", "surrogatepass"))
        else:
            size = value if self.keyword == "maximum" else len(value)
        if size > most:
            raise PydanticCustomError("limit", "{size} is more than this server's {limit}={most}", {"size": size, "limit": self.limit, "most": most})  # fmt: skip
        return value


def published(schema: Any, limits: RequestLimits) -> Any:
    """A JSON schema with the bounds in force."""
    if isinstance(schema, dict):
        if set(schema) == {"limit"} and hasattr(limits, str(schema["limit"])):
            return getattr(limits, schema["limit"])
        return {key: published(value, limits) for key, value in schema.items()}
    return [published(item, limits) for item in schema] if isinstance(schema, list) else schema
