"""Language models behind the OpenAI API: asked once, remembered on disk, counted before they are paid for."""
