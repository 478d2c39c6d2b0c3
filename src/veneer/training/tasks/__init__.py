"""Tasks: how rows become examples, how the model's outputs become a loss, and how an adapter is measured. One file each.

``TASKS`` is the table of the option ``task``. The contract is the class `Task`, which is also supervised fine-tuning.
"""

from veneer.config import TrainOptions
from veneer.training.tasks.base import Task, TaskLosses, TaskScores, TokenLosses
from veneer.training.tasks.dpo import DPO
from veneer.training.tasks.heads import Classification, Regression, TokenClassification
from veneer.training.tasks.kto import KTO
from veneer.training.tasks.orpo import ORPO

__all__ = ["TASKS", "Task", "TaskLosses", "TaskScores", "TokenLosses", "task_of"]

TASKS: dict[str, type[Task]] = {
    cls.name: cls for cls in (Task, DPO, ORPO, KTO, Classification, Regression, TokenClassification)
}
"""The class of each task by its name."""


def task_of(options: TrainOptions) -> Task:
    """The task of a job, with its options."""
    return TASKS[options.task](options)
