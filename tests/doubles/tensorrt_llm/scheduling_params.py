from ._contract import dataclass_of

SchedulingParams = dataclass_of("SchedulingParams", slots=True)
