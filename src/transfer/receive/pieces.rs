//! Decodes a body in pieces, which is used for content of unknown length.

use bytes::BytesMut;

use crate::error::{Code, Reason};
use crate::protocol::{Frame, MAX_PIECE, Message, PIECE, Trailer, Working, peek_varint};

/// Takes the bytes of the body in order and passes on the content.
#[derive(Default)]
pub(super) struct Pieces {
    /// Bytes left in the current piece.
    left: u64,
    /// The first bytes of the next piece or message.
    head: BytesMut,
    trailer: Option<Trailer>,
}

impl Pieces {
    /// Takes the next bytes of the body.
    pub(super) fn take(
        &mut self,
        mut data: &[u8],
        mut content: impl FnMut(&[u8]) -> Result<(), Reason>,
    ) -> Result<(), Reason> {
        while let Some((&byte, rest)) = data.split_first() {
            if self.left > 0 {
                let (part, rest) = data.split_at(data.len().min(self.left as usize));
                content(part)?;
                self.left -= part.len() as u64;
                data = rest;
                continue;
            }
            if self.trailer.is_some() {
                return Err(Reason::new(
                    Code::Protocol,
                    "the stream continues after its trailer",
                ));
            }
            self.head.extend_from_slice(&[byte]);
            data = rest;
            self.begin()?;
        }
        Ok(())
    }

    /// Decodes the head if it is complete. It is called for each byte, but heads are short.
    fn begin(&mut self) -> Result<(), Reason> {
        let bad = |why: String| Reason::new(Code::Protocol, why);
        if self.head[0] == PIECE {
            if let Some((length, _)) = peek_varint(&self.head[1..]) {
                if length == 0 || length > MAX_PIECE {
                    return Err(bad(format!("invalid length of a piece: {length} bytes")));
                }
                self.left = length;
                self.head.clear();
            }
            return Ok(());
        }
        let Some(frame) =
            Frame::take(&mut self.head, Trailer::LIMIT).map_err(|e| bad(e.to_string()))?
        else {
            return Ok(());
        };
        if frame.kind == Working::TYPE {
            return frame
                .decode::<Working>()
                .map(drop)
                .map_err(|e| bad(e.to_string()));
        }
        self.trailer = Some(frame.decode().map_err(|e| bad(e.to_string()))?);
        Ok(())
    }

    /// Returns the trailer after the stream has ended.
    pub(super) fn trailer(&self) -> Result<Trailer, Reason> {
        self.trailer
            .ok_or_else(|| Reason::new(Code::Protocol, "the body ended without its trailer"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;

    fn piece(bytes: &[u8]) -> Vec<u8> {
        let mut out = BytesMut::new();
        out.put_u8(PIECE);
        crate::protocol::put_varint(&mut out, bytes.len() as u64);
        out.extend_from_slice(bytes);
        out.to_vec()
    }

    fn take(stream: &[u8], cut: usize) -> Result<(Vec<u8>, Trailer), Reason> {
        let mut pieces = Pieces::default();
        let mut content = Vec::new();
        for part in stream.chunks(cut) {
            pieces.take(part, |bytes| {
                content.extend_from_slice(bytes);
                Ok(())
            })?;
        }
        Ok((content, pieces.trailer()?))
    }

    #[test]
    fn pieces_form_the_content_at_any_chunk_size() {
        let trailer = Trailer {
            digest: [7; 32],
            size: Some(405),
        };
        let large = [9; 400];
        let stream = [
            piece(b"a"),
            Working {}.to_bytes().to_vec(),
            piece(&large),
            piece(b"last"),
            trailer.to_bytes().to_vec(),
        ]
        .concat();
        for cut in 1..=stream.len() {
            assert_eq!(
                take(&stream, cut),
                Ok(([&b"a"[..], &large, b"last"].concat(), trailer)),
                "{cut}"
            );
        }
        for end in 0..stream.len() {
            assert_eq!(
                take(&stream[..end], 50).unwrap_err().code,
                Code::Protocol,
                "{end}"
            );
        }
    }

    #[test]
    fn invalid_pieces_are_refused() {
        let trailer = Trailer {
            digest: [7; 32],
            size: Some(0),
        }
        .to_bytes();
        for bad in [
            piece(b""),
            vec![PIECE, 0x80, 0x10, 0, 0],
            vec![0x20, 1, 0xa0],
            vec![0x0a, 0x7f, 0xff],
            [&trailer[..], b"x"].concat(),
            [&trailer[..], &trailer[..]].concat(),
        ] {
            assert_eq!(take(&bad, 3).unwrap_err().code, Code::Protocol, "{bad:x?}");
        }
    }
}
