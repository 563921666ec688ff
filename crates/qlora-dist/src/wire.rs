//! What goes over a connection: greetings while ranks meet, then frames.
//!
//! A greeting is [`MAGIC`], the version and a length, 4 bytes each in little endian, and JSON of that length. A frame is a byte
//! that says what it is, a length, and that many bytes; each kind has a length that it can't exceed, and a message of any
//! length is a `Begin` and as many parts as it takes. So what comes from elsewhere is noticed in its first bytes, nothing is
//! allocated because a peer says so, and a sign of life or a failure waits for one part at most.

use std::fmt;
use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How every greeting begins.
pub(crate) const MAGIC: [u8; 8] = *b"QLORA\0DP";
/// To be increased with every change of what is said here.
pub(crate) const VERSION: u32 = 1;
/// Bytes of a greeting's JSON at most: the hosts of a large run.
const GREETING: usize = 1 << 20;
/// Bytes of a part at most.
pub(crate) const PART: usize = 1 << 20;
/// Bytes of a failure at most.
const FAILURE: usize = 1 << 14;
/// Bytes before a frame's content.
pub(crate) const HEADER: usize = 5;

/// What a rank says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub rank: usize,
    pub world_size: usize,
    pub host: String,
    pub run: String,
    pub program: String,
}

/// What rank 0 answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The rank does not belong here, and why.
    Refused(String),
    /// It is taken, and others are awaited.
    Taken,
    /// All are there: the host of each rank.
    Welcome(Vec<String>),
}

/// Writes a greeting.
pub(crate) fn greet(mut to: impl Write, greeting: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(greeting)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(u32::try_from(json.len()).map_err(io::Error::other)?.to_le_bytes());
    bytes.extend(json);
    to.write_all(&bytes)
}

/// Reads a greeting. What is wrong with what came instead is the error of kind `InvalidData`.
pub(crate) fn greeting<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut magic = [0; MAGIC.len()];
    from.read_exact(&mut magic)?;
    if magic != MAGIC {
        let seen = magic.escape_ascii();
        return Err(invalid(format!("it begins with \"{seen}\"")));
    }
    let mut number = || {
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes).map(|()| u32::from_le_bytes(bytes))
    };
    let (version, len) = (number()?, number()? as usize);
    if version != VERSION {
        return Err(invalid(format!(
            "it speaks version {version} of the protocol, and this program version {VERSION}"
        )));
    }
    if len > GREETING {
        return Err(invalid(format!("its greeting has {len} bytes")));
    }
    let mut json = Vec::new();
    from.take(len as u64).read_to_end(&mut json)?;
    if json.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&json).map_err(|error| invalid(format!("its greeting can't be read: {error}")))
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Op {
    Broadcast = 1,
    Gather = 2,
    Sum = 3,
    Agree = 4,
    Compare = 5,
}

impl Op {
    fn of(byte: u8) -> Option<Self> {
        [Self::Broadcast, Self::Gather, Self::Sum, Self::Agree, Self::Compare].into_iter().find(|op| *op as u8 == byte)
    }
}

/// The number of an operation in a run, and what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub op: Op,
    pub number: u64,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.op {
            Op::Broadcast => "broadcast",
            Op::Gather => "gather",
            Op::Sum => "sum",
            Op::Agree => "agree",
            Op::Compare => "compare",
        };
        write!(f, "{} ({name})", self.number)
    }
}

/// What became of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub rank: usize,
    pub host: String,
    pub cause: String,
}

/// What a frame says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The sender lives.
    Beat,
    /// A rank has failed.
    Fail(Failure),
    /// A message of `len` bytes follows in parts.
    Begin { call: Call, len: u64 },
    /// The next bytes of it.
    Part(Vec<u8>),
    /// The sender is done and leaves.
    Bye,
}

const BEAT: u8 = 1;
const FAIL: u8 = 2;
const BEGIN: u8 = 3;
const PART_TAG: u8 = 4;
const BYE: u8 = 5;
const BEGIN_LEN: usize = 17;

fn framed(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER + content.len());
    frame.push(tag);
    frame.extend((content.len() as u32).to_le_bytes());
    frame.extend(content);
    frame
}

pub(crate) fn beat() -> Vec<u8> {
    framed(BEAT, &[])
}

pub(crate) fn bye() -> Vec<u8> {
    framed(BYE, &[])
}

pub(crate) fn begin(call: Call, len: usize) -> Vec<u8> {
    let mut content = vec![call.op as u8];
    content.extend(call.number.to_le_bytes());
    content.extend((len as u64).to_le_bytes());
    framed(BEGIN, &content)
}

/// A part of at most [`PART`] bytes.
pub(crate) fn part(bytes: &[u8]) -> Vec<u8> {
    framed(PART_TAG, bytes)
}

/// A failure; of a cause that is too long its beginning.
pub(crate) fn fail(failure: &Failure) -> Vec<u8> {
    // A character takes six bytes of JSON at most.
    let short = |text: &str, most: usize| text.chars().take(most).collect::<String>();
    let failure = Failure {
        rank: failure.rank,
        host: short(&failure.host, 256),
        cause: short(&failure.cause, FAILURE / 6 - 512),
    };
    framed(FAIL, &serde_json::to_vec(&failure).unwrap_or_default())
}

/// What kind of frame a header announces, and how many bytes of content; or what is wrong with it.
pub(crate) fn header(bytes: [u8; HEADER]) -> Result<(u8, usize), String> {
    let [tag, len @ ..] = bytes;
    let len = u32::from_le_bytes(len) as usize;
    let allowed = match tag {
        BEAT | BYE => 0..=0,
        FAIL => 2..=FAILURE,
        BEGIN => BEGIN_LEN..=BEGIN_LEN,
        PART_TAG => 1..=PART,
        _ => return Err(format!("it sent a frame of kind {tag}, which there is not")),
    };
    if allowed.contains(&len) { Ok((tag, len)) } else { Err(format!("it sent a frame of kind {tag} of {len} bytes")) }
}

/// The frame of a header and its content; or what is wrong with it.
pub(crate) fn frame(tag: u8, content: Vec<u8>) -> Result<Frame, String> {
    let number = |at: usize| {
        let bytes = content.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_le_bytes).ok_or_else(|| "it sent a frame that is too short".to_string())
    };
    Ok(match tag {
        BEAT => Frame::Beat,
        BYE => Frame::Bye,
        FAIL => Frame::Fail(
            serde_json::from_slice(&content).map_err(|e| format!("it sent a failure that can't be read: {e}"))?,
        ),
        PART_TAG => Frame::Part(content),
        _ => {
            let op = content.first().copied().and_then(Op::of).ok_or("it sent an operation that there is not")?;
            Frame::Begin { call: Call { op, number: number(1)? }, len: number(9)? }
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn read(bytes: &[u8]) -> Result<Frame, String> {
        let (tag, len) = header(bytes[..HEADER].try_into().unwrap())?;
        assert_eq!(bytes.len(), HEADER + len);
        frame(tag, bytes[HEADER..].to_vec())
    }

    #[test]
    fn frames_read_back() {
        assert_eq!(read(&beat()), Ok(Frame::Beat));
        assert_eq!(read(&bye()), Ok(Frame::Bye));
        let call = Call { op: Op::Sum, number: u64::MAX };
        assert_eq!(read(&begin(call, 5)), Ok(Frame::Begin { call, len: 5 }));
        assert_eq!(read(&part(&[7; PART])), Ok(Frame::Part(vec![7; PART])));
        // Six bytes of JSON for each character.
        let failure = Failure { rank: 3, host: "\u{1}".repeat(1000), cause: "\u{1}".repeat(100_000) };
        let Ok(Frame::Fail(read)) = read(&fail(&failure)) else { panic!("a failure") };
        assert!(read.rank == 3 && read.cause.len() > 2000, "{}", read.cause.len());
    }

    proptest! {
        /// Rubbish is an error or a frame, never a panic, and announces no more than a part.
        #[test]
        fn rubbish_is_told(bytes in prop::array::uniform5(any::<u8>()), content in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok((_, len)) = header(bytes) {
                prop_assert!(len <= PART);
            }
            let _ = frame(bytes[0], content.clone());
            let _ = greeting::<Hello>(&content[..]);
            let mut behind = MAGIC.to_vec();
            behind.extend(VERSION.to_le_bytes());
            behind.extend(&content);
            let _ = greeting::<Answer>(&behind[..]);
        }
    }
}
