"""The page of the demo: `studio` does the work, `views` writes HTML, `page` wires them with Gradio, `server` serves."""
