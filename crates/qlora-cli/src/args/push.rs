//! The command that uploads.

use std::path::PathBuf;

use clap::Args;

/// `qlora push`.
#[derive(Debug, Args)]
#[command(after_help = "\
The token comes from HF_TOKEN, or from `hf auth login`; it needs write access.

A folder without README.md gets a model card that states base model, data, hyper-parameters and losses, as far
as the run's folder around it tells them. Training state (optimizer, configuration with local paths) stays here.
Everything becomes visible in one commit; a push that breaks off leaves the repository as it was.")]
pub struct PushArgs {
    /// The folder: an adapter, or a checkpoint from `qlora merge` or `qlora quantize`
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// The repository, `user/name`; `name` alone is the token's own user's
    #[arg(value_name = "REPO")]
    pub repo: String,
    /// Make the repository private, if it is made now
    #[arg(long)]
    pub private: bool,
    /// The branch; it is made if it does not exist
    #[arg(long, default_value = "main", value_name = "BRANCH")]
    pub revision: String,
    /// The first line of the commit
    #[arg(long, default_value = "Upload with burn-qlora", value_name = "TEXT")]
    pub message: String,
    /// The base model's hub id, where the adapter names a local folder
    #[arg(long, value_name = "ID")]
    pub base_model: Option<String>,
    /// Show the files and the model card, and stop
    #[arg(long)]
    pub dry_run: bool,
}
