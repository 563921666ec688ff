//! A preview as a page of its own: no script, nothing loaded.

use super::{Lengths, Preview, PreviewRow};
use crate::visible;
use crate::words::grouped;

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.6 ui-monospace, monospace; margin: 0; }
pre span { opacity: .6; }
pre span:hover { outline: 1px solid; }
pre .l { opacity: 1; background: #7c76; text-decoration: underline #2a2; }
pre .s { font-weight: bold; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: 0 .5rem; text-align: right; }
td.bar { text-align: left; }
td.bar i { display: inline-block; background: #58a; height: .8em; margin-right: .4rem; }
tr.limit td { border-top: 2px solid #c33; text-align: left; color: #c33; }
";

/// Width of the longest bar, in rem.
const BAR: f64 = 25.0;

impl Preview {
    /// The preview as an HTML page that needs nothing else. Learned tokens have a background and a line beneath; each
    /// shows its position and id when the pointer is on it.
    pub fn to_html(&self) -> String {
        let title = escaped(&self.report.sources);
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>Preview of {title}</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>Rows as they are trained</h1>\n"
        );
        for line in self.summary() {
            page.push_str(&format!("<div>{}</div>\n", escaped(&line)));
        }
        let notices = self.report.notice_sentences();
        if !notices.is_empty() {
            page.push_str("<ul>\n");
            for notice in notices {
                page.push_str(&format!("<li>{}</li>\n", escaped(&notice)));
            }
            page.push_str("</ul>\n");
        }
        lengths(&mut page, &self.lengths);
        for row in &self.rows {
            self::row(&mut page, row);
        }
        page.push_str("</body>\n</html>\n");
        page
    }
}

fn row(page: &mut String, row: &PreviewRow) {
    page.push_str(&format!("<h2>{}</h2>\n<pre>", escaped(&row.title())));
    for (position, token) in row.tokens.iter().enumerate() {
        let class = match (token.learned, token.special) {
            (false, false) => "",
            (true, false) => " class=\"l\"",
            (false, true) => " class=\"s\"",
            (true, true) => " class=\"l s\"",
        };
        let lines: Vec<_> = token.text.split('\n').map(escaped).collect();
        let text = lines.join(&format!("{}\n", visible::LINE_BREAK));
        page.push_str(&format!("<span{class} title=\"{position}: {}\">{text}</span>", token.id));
    }
    page.push_str("</pre>\n");
}

fn lengths(page: &mut String, lengths: &Lengths) {
    let largest = lengths.largest().max(1) as f64;
    let bar = |name: &str, rows: usize, what: &str| {
        let width = BAR * rows as f64 / largest;
        format!(
            "<tr><td>{name}</td><td class=\"bar\"><i style=\"width:{width:.2}rem\"></i>{}{what}</td></tr>\n",
            grouped(rows as u64)
        )
    };
    page.push_str("<h2>Lengths in tokens, and their rows</h2>\n<table>\n");
    for bin in &lengths.bins {
        let name = format!("{} to {}", grouped(bin.from as u64), grouped(bin.to as u64));
        page.push_str(&bar(&name, bin.rows, ""));
    }
    let limit = grouped(lengths.max_length as u64);
    page.push_str(&format!("<tr class=\"limit\"><td colspan=\"2\">data.max_length = {limit}</td></tr>\n"));
    if lengths.cut > 0 {
        page.push_str(&bar("longer", lengths.cut, ", cut"));
    }
    page.push_str("</table>\n");
}

/// A text that is nothing but text in HTML, in attributes too.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in visible::text(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}
