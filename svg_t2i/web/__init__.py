"""The page in the browser. page: its layout in Gradio. requests: limits, execution and files of a request."""
