//! TensorBoard's event files: records of TFRecord, each a protobuf message `Event`.
//!
//! A record is its length, u64, the masked CRC-32C of those eight bytes, the message, and the masked CRC-32C of the message, all
//! little-endian. Masked is `rotate_right(crc, 15) + 0xa282ead8`. Of `event.proto` and `summary.proto` the few fields that are needed are
//! written by hand:
//!
//! | message | fields |
//! |---|---|
//! | `Event` | 1 `wall_time` double, 2 `step` int64, 3 `file_version` string, 5 `summary`, 7 `session_log` |
//! | `Summary` | 1 `value`, repeated: 1 `tag`, 2 `simple_value` float, 8 `tensor`, 9 `metadata` |
//! | `TensorProto` | 1 `dtype` (7: string), 2 `tensor_shape` of 2 `dim` of 1 `size`, 8 `string_val` |
//! | `SummaryMetadata` | 1 `plugin_data` of 1 `plugin_name` |
//! | `SessionLog` | 1 `status` (1: start): readers drop what earlier files have of this step and later ones |

/// A scalar or text of one step.
pub(super) enum Value<'a> {
    Scalar(f32),
    Text(&'a str),
}

/// The first record of a file.
pub(super) fn version(wall_time: f64) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, wall_time).bytes(3, b"brain.Event:2");
    record(&event.0)
}

/// A record that says that a run goes on at `step`.
pub(super) fn restart(wall_time: f64, step: u64) -> Vec<u8> {
    let mut start = Message::default();
    start.varint(1, 1);
    let mut event = Message::default();
    event.double(1, wall_time).varint(2, step).message(7, &start);
    record(&event.0)
}

/// A record of values by their tags.
pub(super) fn values(wall_time: f64, step: u64, values: &[(&str, Value<'_>)]) -> Vec<u8> {
    let mut summary = Message::default();
    for (tag, value) in values {
        let mut entry = Message::default();
        entry.bytes(1, tag.as_bytes());
        match value {
            Value::Scalar(value) => {
                entry.float(2, *value);
            }
            Value::Text(text) => {
                let size = Message::of(|size| size.varint(1, 1));
                let shape = Message::of(|shape| shape.message(2, &size));
                let tensor = Message::of(|tensor| tensor.varint(1, 7).message(2, &shape).bytes(8, text.as_bytes()));
                let plugin = Message::of(|plugin| plugin.bytes(1, b"text"));
                let metadata = Message::of(|metadata| metadata.message(1, &plugin));
                entry.message(8, &tensor).message(9, &metadata);
            }
        }
        summary.message(1, &entry);
    }
    let mut event = Message::default();
    event.double(1, wall_time).varint(2, step).message(5, &summary);
    record(&event.0)
}

/// A message of protobuf.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn of(write: impl FnOnce(&mut Self) -> &mut Self) -> Self {
        let mut message = Self::default();
        write(&mut message);
        message
    }

    fn number(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u64, value: u64) -> &mut Self {
        self.number(field << 3);
        self.number(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.number(field << 3 | 1);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.number(field << 3 | 5);
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, value: &[u8]) -> &mut Self {
        self.number(field << 3 | 2);
        self.number(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn message(&mut self, field: u64, value: &Self) -> &mut Self {
        self.bytes(field, &value.0)
    }
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(message.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    record.extend_from_slice(message);
    record.extend_from_slice(&masked(crc32c(message)).to_le_bytes());
    record
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC-32C of one byte before others: Castagnoli's polynomial, its bits reversed.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of RFC 3720, appendix B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46DD_794E);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    /// What the `tensorboard` package (2.21) writes of the same events.
    #[test]
    fn records_are_those_of_tensorboard() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let first = "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c";
        assert_eq!(hex(&version(1.5)), first);
        let start = "100000000000000095fbfe1809000000000000044010ac023a0208017d05b37d";
        assert_eq!(hex(&restart(2.5, 300)), start);
        let both = [("train/loss", Value::Scalar(0.75)), ("answers/0", Value::Text("hello"))];
        let record = "4800000000000000fe92489d090000000000000c4010072a3b0a110a0a747261696e2f6c6f7373150000403f0a260a09616e73776572732f30\
                      420f0807120412020801420568656c6c6f4a080a060a0474657874da799d4d";
        assert_eq!(hex(&values(3.5, 7, &both)), record);
    }
}
