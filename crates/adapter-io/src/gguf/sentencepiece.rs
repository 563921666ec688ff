//! The pieces of a SentencePiece model, `tokenizer.model`.
//!
//! It is a protocol buffer (`sentencepiece_model.proto`); only the repeated field 1 of `ModelProto` is read,
//! of whose messages field 1 is the piece, 2 its score (float) and 3 its type. Other fields are skipped by
//! their wire type (<https://protobuf.dev/programming-guides/encoding/>).

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Piece {
    pub text: Vec<u8>,
    pub score: f32,
    /// 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte: the numbers of GGUF, too.
    pub kind: i32,
}

/// All pieces of a model file.
pub(super) fn pieces(bytes: &[u8]) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        if let (1, Field::Bytes(message)) = field(&mut rest)? {
            pieces.push(piece(message)?);
        }
    }
    if pieces.is_empty() { Err("it holds no pieces".into()) } else { Ok(pieces) }
}

fn piece(mut message: &[u8]) -> Result<Piece, String> {
    let mut piece = Piece { text: Vec::new(), score: 0.0, kind: 1 };
    while !message.is_empty() {
        match field(&mut message)? {
            (1, Field::Bytes(text)) => piece.text = text.to_vec(),
            (2, Field::Four(bytes)) => piece.score = f32::from_le_bytes(bytes),
            (3, Field::Number(kind)) => piece.kind = i32::try_from(kind).unwrap_or(1),
            _ => {}
        }
    }
    Ok(piece)
}

enum Field<'a> {
    Number(u64),
    Eight,
    Bytes(&'a [u8]),
    Four([u8; 4]),
}

fn field<'a>(rest: &mut &'a [u8]) -> Result<(u64, Field<'a>), String> {
    let key = number(rest)?;
    let value = match key & 7 {
        0 => Field::Number(number(rest)?),
        1 => {
            take(rest, 8)?;
            Field::Eight
        }
        2 => {
            let length = number(rest)?;
            Field::Bytes(take(rest, length)?)
        }
        5 => {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(take(rest, 4)?);
            Field::Four(bytes)
        }
        other => return Err(format!("wire type {other} is not one of a SentencePiece model")),
    };
    Ok((key >> 3, value))
}

fn take<'a>(rest: &mut &'a [u8], length: u64) -> Result<&'a [u8], String> {
    match usize::try_from(length).ok().and_then(|n| rest.split_at_checked(n)) {
        Some((taken, after)) => {
            *rest = after;
            Ok(taken)
        }
        None => Err("it ends in the middle of a field".into()),
    }
}

fn number(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("a number in it is too long".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_and_other_fields_skipped() {
        let mut piece_bytes = vec![0x0a, 2, b'a', b'b', 0x15];
        piece_bytes.extend((-1.5f32).to_le_bytes());
        piece_bytes.extend([0x18, 3]);
        let mut file = vec![0x0a, piece_bytes.len() as u8];
        file.extend(&piece_bytes);
        // A trainer specification (field 2) and a number (field 7).
        file.extend([0x12, 3, 1, 2, 3, 0x38, 0x96, 0x01]);
        file.extend([0x0a, 3, 0x0a, 1, b'c']);
        let expected =
            [Piece { text: b"ab".to_vec(), score: -1.5, kind: 3 }, Piece { text: b"c".to_vec(), score: 0.0, kind: 1 }];
        assert_eq!(pieces(&file).unwrap(), expected);
        for end in [3, 9, file.len() - 1] {
            assert!(pieces(&file[..end]).is_err());
        }
        assert!(pieces(&[]).is_err() && pieces(&[0xff; 12]).is_err());
    }
}
