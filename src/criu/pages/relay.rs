//! The page server that CRIU sends its pages to, at the source.

use std::net::{Ipv4Addr, SocketAddr};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{Command, Layout, Reader, Seen};
use crate::criu::{Error, Result};
use crate::netlink::Namespace;
use crate::netlink::sockets::Diagnosis;

/// Pages are passed on in pieces of at most this many bytes: 1 MiB.
const PIECE: usize = 1 << 20;

/// A page server on this host's loopback interface, which CRIU can be told to use.
#[derive(Debug)]
pub struct Relay {
    listener: TcpListener,
    address: SocketAddr,
    layout: Layout,
}

impl Relay {
    /// Begins to listen to a CRIU that lays its commands out like this.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn listen(layout: Layout) -> Result<Relay> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.map_err(Error::Relay)?;
        let address = listener.local_addr().map_err(Error::Relay)?;
        Ok(Relay {
            listener,
            address,
            layout,
        })
    }

    /// What CRIU has to be told, line by line, as in criu(8) without the dashes.
    pub fn options(&self) -> [String; 3] {
        [
            "page-server".to_owned(),
            format!("address {}", self.address.ip()),
            format!("port {}", self.address.port()),
        ]
    }

    /// Passes on what one CRIU sends, commands and pages as they come. `has_parent` is what CRIU is told
    /// when it asks whether the destination has an earlier round of its memory.
    ///
    /// # Errors
    /// The stream fails with [`Error::Relay`] if the connection breaks, and with [`Error::Pages`] if it is
    /// not CRIU that speaks. It ends when CRIU says that that was all.
    pub fn pages(self, has_parent: bool) -> impl Stream<Item = Result<Bytes>> + Send {
        futures::stream::try_unfold(State::Waiting(self), move |state| async move {
            let mut talk = match state {
                State::Waiting(relay) => relay.accept(has_parent).await?,
                State::Talking(talk) => talk,
                State::Ended => return Ok(None),
            };
            let piece = talk.piece().await?;
            let state = match talk.reader.ended {
                true => State::Ended,
                false => State::Talking(talk),
            };
            Ok(Some((piece, state)))
        })
    }

    /// Waits for CRIU. Everyone on this host can connect; what others than root say is not heard.
    async fn accept(self, has_parent: bool) -> Result<Talk> {
        loop {
            let (stream, peer) = self.listener.accept().await.map_err(Error::Relay)?;
            let owner = Namespace::current()
                .and_then(|here| Diagnosis::open(&here))
                .and_then(|mut sockets| sockets.owner(peer, self.address));
            match owner {
                Ok(Some(0)) => {
                    return Ok(Talk {
                        stream,
                        has_parent,
                        reader: Reader::new(self.layout),
                        buffer: BytesMut::new(),
                    });
                }
                owner => {
                    tracing::warn!(?owner, %peer, "somebody else than CRIU wanted to send pages");
                }
            }
        }
    }
}

enum State {
    Waiting(Relay),
    Talking(Talk),
    Ended,
}

/// CRIU, while it sends.
struct Talk {
    stream: TcpStream,
    has_parent: bool,
    reader: Reader,
    buffer: BytesMut,
}

impl Talk {
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
