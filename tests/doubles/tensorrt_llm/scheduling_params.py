from ._contract import OLD, dataclass_of

SchedulingParams = dataclass_of("SchedulingParams", slots=True)
if not OLD:
    ConversationParams = dataclass_of("ConversationParams", slots=True)
