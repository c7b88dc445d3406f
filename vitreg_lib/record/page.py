"""Self-contained HTML pages from Jinja templates."""

import base64
from pathlib import Path

PAGES = Path(__file__).parent / "pages"


def page(template: Path, **values) -> str:
    """The page that a template makes of these values; it may extend pages/base.html and embed PNGs by `data_url`."""
    import jinja2

    loader = jinja2.FileSystemLoader([template.parent, PAGES])
    options = dict(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    templates = jinja2.Environment(loader=loader, **options)
    templates.filters["data_url"] = data_url
    return templates.get_template(template.name).render(values)


def data_url(picture: bytes | Path) -> str:
    """A PNG, from bytes or a file, as a data URL."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
