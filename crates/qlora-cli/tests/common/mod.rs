//! Runs the `qlora` program in a folder of its own, on the recorded tiny model.

#![allow(dead_code)] // each test program uses a part

pub mod browser;
pub mod server;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A recorded file or folder.
pub fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/reference")
        .join(path)
        .canonicalize()
        .expect("testdata is part of the repository")
}

/// A working folder with data and a configuration.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    /// Twelve rows of word problems and a configuration that trains a few small steps on them.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/quickstart/word_problems.jsonl");
        let rows = std::fs::read_to_string(all).expect("the quickstart's data");
        let rows: String = rows.lines().take(12).map(|row| format!("{row}\n")).collect();
        let bench = Self { dir };
        bench.write("rows.jsonl", &rows);
        let model = reference("tiny-llama");
        bench.write(
            "qlora.toml",
            &format!(
                "device = \"cpu\"\n[model]\npath = {:?}\n[lora]\nrank = 4\n[data]\ntrain = \"rows.jsonl\"\nmax_length = 96\n\
                 [train]\noutput_dir = \"run\"\nmax_steps = 4\nbatch_size = 2\ngradient_accumulation_steps = 1\nlearning_rate = 1e-3\n\
                 save_every = 2\n",
                model.display().to_string()
            ),
        );
        bench
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file in the folder.
    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("a writable temporary folder");
    }

    /// Reads a file in the folder.
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Copies the files of a recorded folder into the folder, to break something in it.
    pub fn copy(&self, from: &str, name: &str) -> PathBuf {
        let to = self.path(name);
        std::fs::create_dir_all(&to).expect("a writable temporary folder");
        for entry in std::fs::read_dir(reference(from)).expect("a recorded folder") {
            let entry = entry.expect("a readable folder");
            if entry.path().is_file() {
                std::fs::copy(entry.path(), to.join(entry.file_name())).expect("a copy");
            }
        }
        to
    }

    /// The program with these arguments, in the folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qlora"));
        command.current_dir(self.dir.path()).args(args).env_remove("RUST_LOG").env_remove("RUST_BACKTRACE");
        // Names that are no folders must not be looked for outside.
        command.env("HF_HUB_OFFLINE", "1");
        command
    }

    /// Runs a shell command in the folder.
    pub fn shell(&self, script: &str) -> Run {
        let mut command = Command::new("sh");
        Run::new(command.current_dir(self.dir.path()).args(["-c", script]).output().expect("the shell starts"))
    }

    /// Runs the program.
    pub fn run(&self, args: &[&str]) -> Run {
        Run::new(self.command(args).output().expect("the program starts"))
    }

    /// Runs the program and expects it to succeed.
    pub fn ok(&self, args: &[&str]) -> Run {
        let run = self.run(args);
        assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
        run
    }

    /// Runs the program, expects an exit code and every one of `words` in its message, and neither a
    /// panic nor a backtrace.
    pub fn fails(&self, args: &[&str], code: i32, words: &[&str]) -> Run {
        let run = self.run(args);
        assert_eq!(run.code, Some(code), "{args:?}: {}", run.stderr);
        for word in words {
            assert!(run.stderr.contains(word), "{args:?}: `{word}` is not in: {}", run.stderr);
        }
        for word in ["panicked", "stack backtrace"] {
            assert!(!run.stderr.contains(word), "{args:?}: {}", run.stderr);
        }
        run
    }
}

/// What a run of the program left.
pub struct Run {
    /// The exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Run {
    pub fn new(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}
