//! Spans as `tracing` tells of them.

use std::fmt::{Debug, Write as _};
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::Recorder;

/// Records spans for a [`Profile`](super::Profile).
#[derive(Clone, Debug)]
pub struct ProfileLayer(pub(super) Arc<Recorder>);

impl ProfileLayer {
    /// The spans that a profile is made of: this workspace's, whatever their level.
    pub fn filter(metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("qlora_")
    }
}

/// A span's name with the values of its fields.
struct Label(String);

impl Visit for Label {
    fn record_debug(&mut self, _: &Field, value: &dyn Debug) {
        // Writing to a string can't fail.
        let _ = write!(self.0, " {value:?}");
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for ProfileLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut label = Label(span.name().to_owned());
            attributes.record(&mut label);
            span.extensions_mut().insert(label);
        }
    }

    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let label = span.extensions().get::<Label>().map(|label| label.0.clone());
            self.0.enter(span.name(), label.unwrap_or_else(|| span.name().to_owned()));
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            self.0.exit(span.name());
        }
    }
}
