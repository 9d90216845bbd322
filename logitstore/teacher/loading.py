"""Loading of a teacher by its settings."""

from __future__ import annotations

from logitstore.teacher.protocol import Method, Teacher, TeacherSettings


def load_teacher(settings: TeacherSettings, method: Method) -> Teacher:
    """Load the teacher that the settings name, ready to score.

    Raises:
        ConfigError: the tokenizer does not fit the model, or the device is not there.
        TeacherError: the model cannot be loaded.
    """
    # An engine is imported when it is asked for: they take seconds and gigabytes.
    from logitstore.teacher.huggingface import load_huggingface_teacher

    return load_huggingface_teacher(settings, method)
