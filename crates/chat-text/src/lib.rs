//! Conversations to token ids and back: a checkpoint's tokenizer, its chat template, and which of
//! the tokens an assistant wrote. Host memory only; no Burn.
//!
//! - [`Tokenizer`] reads `tokenizer.json` and the settings beside it; [`StreamDecoder`] turns tokens
//!   into text as they come.
//! - [`ChatTemplate`] writes [`Message`]s as one text, as transformers does.
//! - [`ChatTemplate::render_answers`] finds the answers in that text, and [`Tokenizer::encode_labelled`]
//!   carries them to the tokens.
//!
//! ```
//! # fn main() -> Result<(), chat_text::ChatError> {
//! # let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");
//! use chat_text::{ChatInput, MASKED_LABEL, Message, Tokenizer};
//!
//! let tokenizer = Tokenizer::from_dir(dir)?;
//! let messages = [Message::user("What is 2 + 3?"), Message::assistant("5")];
//! let input = ChatInput {
//!     messages: &messages,
//!     tools: None,
//!     add_generation_prompt: false,
//!     special_tokens: tokenizer.special_tokens(),
//!     template_kwargs: None,
//! };
//! let rendered = tokenizer.require_chat_template()?.render_answers(&input)?;
//! assert_eq!(&rendered.text[rendered.spans[0].clone()], "5<|im_end|>\n");
//!
//! let labelled = tokenizer.encode_labelled(&rendered.text, &rendered.spans, false)?;
//! let learned = labelled.labels.iter().filter(|label| **label != MASKED_LABEL);
//! let learned: Vec<u32> = learned.map(|id| *id as u32).collect();
//! assert_eq!(tokenizer.decode(&learned, false)?, "5<|im_end|>\n");
//! # Ok(())
//! # }
//! ```

mod answers;
mod boundary;
mod conversation;
mod error;
mod files;
mod mask;
mod message;
mod prompting;
mod stream;
mod template;
mod tokenizer;

pub use answers::{Rendered, Unwritten, UnwrittenPart};
pub use error::{ChatError, Untraceable};
pub use mask::{Labelled, MASKED_LABEL};
pub use message::Message;
pub use prompting::{
    CHAT_TEMPLATE_FILE, PROMPT_SETTINGS_FILE, Prompt, PromptLayout, PromptSettings, Prompting, alpaca_prompt,
    alpaca_turn,
};
pub use stream::StreamDecoder;
pub use template::{ChatInput, ChatTemplate, SpecialTokens};
pub use tokenizer::{Encoding, Tokenizer};
