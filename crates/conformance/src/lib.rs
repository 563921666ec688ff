//! Comparisons of this workspace with recorded outputs of PEFT, bitsandbytes, transformers and TRL.
//!
//! A reference folder is made by `testdata/make_reference.py`. Everything about it is read from its
//! files: models, shapes, prompts, numbers of steps, hyper-parameters. A section whose files are not
//! there is skipped with a line, and so is what this workspace does not implement yet; skipped lines
//! count neither as passed nor as failed.
//!
//! | section | compares |
//! |---|---|
//! | [`bnb`] | 4-bit codes, statistics and dequantized values on host and device; the 4-bit matmul and its gradient |
//! | [`logits`] | logits and greedy continuations of a model, dense and quantized |
//! | [`qlora`] | a training run step by step, its adapter, and what the adapter computes on each base |
//! | [`preference`] | training from preferences, step by step, beside TRL's trainers |
//! | [`adapters`] | PEFT adapters of each kind: files and logits |
//! | [`archs`] | models of each architecture: logits, gradients, a training step, their adapters' round trip |
//! | [`chat`] | chat templates, as text and as tokens |
//! | [`optimizers`] | parameters and state of AdamW and Lion, 32-bit, 8-bit and paged |
//!
//! Every bar is stated, with its reason, where it is set.

pub mod adapters;
pub mod archs;
pub mod bnb;
pub mod chat;
mod compare;
pub mod logits;
pub mod optimizers;
pub mod preference;
pub mod qlora;
mod reference;
mod report;

pub use reference::Reference;
pub use report::{Case, Line, Report};

use burn::tensor::Device;

/// A part of the reference folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Section {
    /// bitsandbytes' quantization and matmul.
    Bnb,
    /// Logits and greedy continuations.
    Logits,
    /// A QLoRA training run.
    Qlora,
    /// Training from preferences.
    Preference,
    /// PEFT adapters.
    Adapters,
    /// Model families.
    Archs,
    /// Chat templates.
    Chat,
    /// bitsandbytes' optimizers.
    Optimizers,
}

impl Section {
    /// Every section, in the order in which they run.
    pub const ALL: [Self; 8] = [
        Self::Bnb,
        Self::Logits,
        Self::Qlora,
        Self::Preference,
        Self::Adapters,
        Self::Archs,
        Self::Chat,
        Self::Optimizers,
    ];

    /// The section's name, the first part of its cases' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bnb => "bnb",
            Self::Logits => "logits",
            Self::Qlora => "qlora",
            Self::Preference => "preference",
            Self::Adapters => "adapters",
            Self::Archs => "archs",
            Self::Chat => "chat",
            Self::Optimizers => "optimizers",
        }
    }
}

/// Runs sections on a device. An error inside a section is a failed case of that section.
pub fn run(reference: &Reference, device: &Device, sections: &[Section], report: &mut Report) {
    for section in sections {
        let outcome = match section {
            Section::Bnb => bnb::cases(reference, device, report),
            Section::Logits => logits::cases(reference, device, report),
            Section::Qlora => qlora::cases(reference, device, report),
            Section::Preference => preference::cases(reference, device, report),
            Section::Adapters => adapters::cases(reference, device, report),
            Section::Archs => archs::cases(reference, device, report),
            Section::Chat => chat::cases(reference, report),
            Section::Optimizers => optimizers::cases(reference, device, report),
        };
        if let Err(error) = outcome {
            report.fail(section.name(), &format!("{error:#}"));
        }
    }
}
