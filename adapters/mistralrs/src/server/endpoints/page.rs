//! `GET /`: the page, and what it is made of. All of it comes with the program; nothing is fetched from elsewhere.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

use crate::config::PageExample;
use crate::server::App;

/// Nothing but what this server gives may be loaded, run or asked by the page, and no other page may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page; a newer program may have another one under its name.
fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, text)
}

pub(super) async fn index() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("../ui/index.html"))
}

pub(super) async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("../ui/style.css"))
}

pub(super) async fn script() -> impl IntoResponse {
    file(
        "text/javascript; charset=utf-8",
        include_str!("../ui/page.js"),
    )
}

/// The questions that it offers.
pub(super) async fn examples(State(app): State<App>) -> Json<Vec<PageExample>> {
    Json(app.config.examples.clone())
}
