//! Metadata values: how they are held, read and written.

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned byte.
    U8(u8),
    /// Signed byte.
    I8(i8),
    /// Unsigned, 16 bits.
    U16(u16),
    /// Signed, 16 bits.
    I16(i16),
    /// Unsigned, 32 bits.
    U32(u32),
    /// Signed, 32 bits.
    I32(i32),
    /// Float, 32 bits.
    F32(f32),
    /// True or false.
    Bool(bool),
    /// Text, or any bytes: llama.cpp does not ask for UTF-8.
    String(Vec<u8>),
    /// Many of one kind.
    Array(Array),
    /// Unsigned, 64 bits.
    U64(u64),
    /// Signed, 64 bits.
    I64(i64),
    /// Float, 64 bits.
    F64(f64),
}

/// Values of one kind, held without waste.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// Unsigned, 16 bits.
    U16(Vec<u16>),
    /// Signed, 16 bits.
    I16(Vec<i16>),
    /// Unsigned, 32 bits.
    U32(Vec<u32>),
    /// Signed, 32 bits.
    I32(Vec<i32>),
    /// Floats, 32 bits.
    F32(Vec<f32>),
    /// True or false.
    Bool(Vec<bool>),
    /// Texts.
    String(Vec<Vec<u8>>),
    /// Arrays.
    Array(Vec<Array>),
    /// Unsigned, 64 bits.
    U64(Vec<u64>),
    /// Signed, 64 bits.
    I64(Vec<i64>),
    /// Floats, 64 bits.
    F64(Vec<f64>),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::String(text.as_bytes().to_vec())
    }
}

impl Value {
    /// The text of a string that is UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Any unsigned or non-negative whole number.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::U64(x) => Some(x),
            Self::I8(x) => x.try_into().ok(),
            Self::I16(x) => x.try_into().ok(),
            Self::I32(x) => x.try_into().ok(),
            Self::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    fn kind(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// Appends type and value as a file holds them.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.kind().to_le_bytes());
        match self {
            Self::U8(x) => out.push(*x),
            Self::I8(x) => out.extend(x.to_le_bytes()),
            Self::U16(x) => out.extend(x.to_le_bytes()),
            Self::I16(x) => out.extend(x.to_le_bytes()),
            Self::U32(x) => out.extend(x.to_le_bytes()),
            Self::I32(x) => out.extend(x.to_le_bytes()),
            Self::F32(x) => out.extend(x.to_le_bytes()),
            Self::Bool(x) => out.push(u8::from(*x)),
            Self::String(x) => write_string(x, out),
            Self::Array(x) => x.write(out),
            Self::U64(x) => out.extend(x.to_le_bytes()),
            Self::I64(x) => out.extend(x.to_le_bytes()),
            Self::F64(x) => out.extend(x.to_le_bytes()),
        }
    }
}

impl Array {
    fn write(&self, out: &mut Vec<u8>) {
        macro_rules! numbers {
            ($kind:literal, $x:expr) => {{
                head($kind, $x.len(), out);
                $x.iter().for_each(|x| out.extend(x.to_le_bytes()));
            }};
        }
        fn head(kind: u32, len: usize, out: &mut Vec<u8>) {
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        }
        match self {
            Self::U8(x) => numbers!(0, x),
            Self::I8(x) => numbers!(1, x),
            Self::U16(x) => numbers!(2, x),
            Self::I16(x) => numbers!(3, x),
            Self::U32(x) => numbers!(4, x),
            Self::I32(x) => numbers!(5, x),
            Self::F32(x) => numbers!(6, x),
            Self::U64(x) => numbers!(10, x),
            Self::I64(x) => numbers!(11, x),
            Self::F64(x) => numbers!(12, x),
            Self::Bool(x) => {
                head(7, x.len(), out);
                out.extend(x.iter().map(|b| u8::from(*b)));
            }
            Self::String(x) => {
                head(8, x.len(), out);
                x.iter().for_each(|s| write_string(s, out));
            }
            Self::Array(x) => {
                head(9, x.len(), out);
                x.iter().for_each(|a| a.write(out));
            }
        }
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(x) => x.len(),
            Self::I8(x) => x.len(),
            Self::U16(x) => x.len(),
            Self::I16(x) => x.len(),
            Self::U32(x) => x.len(),
            Self::I32(x) => x.len(),
            Self::F32(x) => x.len(),
            Self::Bool(x) => x.len(),
            Self::String(x) => x.len(),
            Self::Array(x) => x.len(),
            Self::U64(x) => x.len(),
            Self::I64(x) => x.len(),
            Self::F64(x) => x.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

pub(crate) fn write_string(text: &[u8], out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

/// Arrays in arrays that are read at most; llama.cpp writes none.
const MAX_DEPTH: usize = 4;

/// Reads forward through bytes that may end anywhere. Nothing is reserved for a count that the remaining
/// bytes could not hold, so memory stays within a few times the file's metadata.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    pub(crate) fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(len).ok().and_then(|len| rest.get(..len)) {
            Some(found) => {
                self.at += found.len();
                Ok(found)
            }
            None => Err(format!("it ends at byte {}, where {len} more bytes should be", self.bytes.len())),
        }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn string(&mut self) -> Result<Vec<u8>, String> {
        let len = self.u64()?;
        self.take(len).map(<[u8]>::to_vec)
    }

    /// A name or key, which has to be text.
    pub(crate) fn text(&mut self) -> Result<String, String> {
        String::from_utf8(self.string()?).map_err(|e| format!("a name before byte {} is not UTF-8: {e}", self.at))
    }

    pub(crate) fn value(&mut self) -> Result<Value, String> {
        Ok(match self.u32()? {
            0 => Value::U8(self.array::<1>()?[0]),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            8 => Value::String(self.string()?),
            9 => Value::Array(self.many(0)?),
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} is not one of GGUF's")),
        })
    }

    fn many(&mut self, depth: usize) -> Result<Array, String> {
        let (kind, count) = (self.u32()?, self.u64()?);
        macro_rules! numbers {
            ($variant:ident, $type:ty) => {{
                let width = size_of::<$type>();
                let bytes = self.take(count.checked_mul(width as u64).ok_or("an array's size overflows")?)?;
                let number = |b: &[u8]| {
                    let mut raw = [0; size_of::<$type>()];
                    raw.copy_from_slice(b);
                    <$type>::from_le_bytes(raw)
                };
                Array::$variant(bytes.chunks_exact(width).map(number).collect())
            }};
        }
        Ok(match kind {
            0 => numbers!(U8, u8),
            1 => numbers!(I8, i8),
            2 => numbers!(U16, u16),
            3 => numbers!(I16, i16),
            4 => numbers!(U32, u32),
            5 => numbers!(I32, i32),
            6 => numbers!(F32, f32),
            7 => Array::Bool(self.take(count)?.iter().map(|b| *b != 0).collect()),
            8 => {
                let mut texts = Vec::new();
                for _ in 0..count {
                    texts.push(self.string()?);
                }
                Array::String(texts)
            }
            9 if depth < MAX_DEPTH => {
                let mut arrays = Vec::new();
                for _ in 0..count {
                    arrays.push(self.many(depth + 1)?);
                }
                Array::Array(arrays)
            }
            9 => return Err(format!("arrays are nested more than {MAX_DEPTH} deep")),
            10 => numbers!(U64, u64),
            11 => numbers!(I64, i64),
            12 => numbers!(F64, f64),
            other => return Err(format!("array type {other} is not one of GGUF's")),
        })
    }
}
