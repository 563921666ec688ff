//! Between text and tokens: prompts, and what answers say.

mod grammar;
mod output;
mod prompt;
mod reasoning;
mod schema;
mod stops;
mod tools;
mod vocabulary;

pub use grammar::{AfterReasoning, Grammar, Grammars, ToolSchema};
pub use output::{Delta, Output, OutputOptions};
pub use prompt::{Conversation, Prompt, template, write};
pub use reasoning::{CLOSE as REASONING_CLOSE, Part, ReasoningSplit};
pub use stops::StopStrings;
pub use tools::{Call, Piece, ToolFormat, ToolParser};
pub use vocabulary::Vocabulary;
