//! The page at `/`.

use axum::body::to_bytes;

use super::support::{config, response, run, says, server, tokenizer};

#[test]
fn the_page_needs_nothing_else() {
    run(async {
        let (script, _) = says("x");
        let state = server(tokenizer(), config(), script);
        let response = response(&state, "GET", "/", None, &[]).await;
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8");
        assert!(response.headers()["content-security-policy"].to_str().unwrap().contains("default-src 'none'"));
        let page = String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap();
        assert!(page.starts_with("<!doctype html>"));
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!page.contains(outside), "{outside}");
        }
        // What a model writes is text and never markup.
        for markup in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"] {
            assert!(!page.contains(markup), "{markup}");
        }
        // Every field has a label, and every name that the script looks up is there.
        let after =
            |mark: &str| page.split(mark).skip(1).map(|rest| rest.split('"').next().unwrap()).collect::<Vec<_>>();
        let ids = after(" id=\"");
        for id in after(" for=\"").iter().chain(&after("$(\"")) {
            assert!(ids.contains(id), "{id}");
        }
        for field in page.split("<input ").chain(page.split("<textarea ")).chain(page.split("<select ")) {
            let tag = field.split('>').next().unwrap();
            let id = tag.split("id=\"").nth(1).and_then(|rest| rest.split('"').next());
            if let Some(id) = id.filter(|_| !tag.starts_with("<!doctype")) {
                assert!(page.contains(&format!("for=\"{id}\"")) || tag.contains("aria-label"), "{id}");
            }
        }
    });
}
