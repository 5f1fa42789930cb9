//! The page server that CRIU sends its pages to, at the source.

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Command, Layout, Reader, Seen};
use crate::criu::{Error, Result};

/// Pages are passed on in pieces of at most this many bytes: 1 MiB.
const PIECE: usize = 1 << 20;

/// Passes on what a CRIU sends, commands and pages as they come. `has_parent` is what CRIU is told when it
/// asks whether the destination has an earlier round of its memory.
///
/// # Errors
/// The stream fails with [`Error::Relay`] if the connection breaks, and with [`Error::Pages`] if it is not
/// CRIU that speaks. It ends when CRIU says that that was all.
pub fn pages<S>(
    criu: S,
    layout: Layout,
    has_parent: bool,
) -> impl Stream<Item = Result<Bytes>> + Send + use<S>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let talk = Talk {
        stream: criu,
        has_parent,
        reader: Reader::new(layout),
        buffer: BytesMut::new(),
    };
    futures::stream::try_unfold(talk, |mut talk| async move {
        if talk.reader.ended {
            return Ok(None);
        }
        let piece = talk.piece().await?;
        Ok(Some((piece, talk)))
    })
}

/// Waits until a CRIU that will serve pages on this connection has come so far: when it answers a question,
/// all else has been dumped.
///
/// # Errors
/// [`Error::Relay`] if it has gone.
pub async fn answers<S>(criu: &mut S, layout: Layout) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    criu.write_all(&layout.has_parent())
        .await
        .map_err(Error::Relay)?;
    // An `int`.
    criu.read_u32().await.map_err(Error::Relay)?;
    Ok(())
}

/// CRIU, while it sends.
struct Talk<S> {
    stream: S,
    has_parent: bool,
    reader: Reader,
    buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<S> {
    /// What has come since. CRIU gets the answers that it waits for.
    async fn piece(&mut self) -> Result<Bytes> {
        self.buffer.reserve(PIECE);
        let got = self.stream.read_buf(&mut self.buffer).await;
        if got.map_err(Error::Relay)? == 0 {
            return Err(Error::Relay(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let piece = self.buffer.split().freeze();
        let mut answers = Vec::new();
        let has_parent = self.has_parent;
        self.reader.read(&piece, |seen| {
            match seen {
                // A `char`.
                Seen::Command(Command::Open(_)) => answers.push(u8::from(has_parent)),
                // An `int`.
                Seen::Command(Command::HasParent(_)) => {
                    answers.extend_from_slice(&u32::from(has_parent).to_ne_bytes());
                }
                // An `int32_t`.
                Seen::Command(Command::Close) => answers.extend_from_slice(&0u32.to_ne_bytes()),
                Seen::Command(Command::Add(..)) | Seen::Pages(_) => {}
            }
            Ok(())
        })?;
        self.stream
            .write_all(&answers)
            .await
            .map_err(Error::Relay)?;
        Ok(piece)
    }
}
