//! What has arrived is read before the container is frozen.
//!
//! CRIU throws away the datagrams that wait in a socket, and refuses connections that wait to be
//! accepted. While new packets wait in the kernel the container's programs go on, so in a moment
//! they have taken out what is there: that moment is waited for, with a bound, watching the sockets
//! through socket diagnosis in the container's network namespace.
//!
//! A container without listening sockets and without UDP sockets costs a look.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::Result;
use crate::netlink::sockets::{Diagnosis, Kind, Socket, State, StateSet};
use crate::netlink::{Backlog, Namespace};

/// How long to wait between two looks.
const LOOK: Duration = Duration::from_micros(500);

/// How long draining took, and what was left in the end.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Drain {
    /// How long connections that were being opened were waited for. The container was served
    /// meanwhile.
    #[serde(rename = "opening_ms", serialize_with = "super::report::milliseconds")]
    pub opening: Duration,
    /// How long what had arrived was waited for. This is part of the downtime.
    #[serde(rename = "arrived_ms", serialize_with = "super::report::milliseconds")]
    pub arrived: Duration,
    /// How many datagrams the container's sockets had dropped because its programs were too slow,
    /// from when the sockets were made until the container was frozen. No hold can help that.
    pub dropped_before: u32,
    /// What was not read in time, and is lost.
    pub left: Vec<Undrained>,
}

/// A socket of the container with something in it that was not taken out in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Undrained {
    /// TCP or UDP.
    pub kind: Kind,
    /// Its own address and port.
    pub local: SocketAddr,
    /// Its peer's; none if it is not connected.
    pub remote: Option<SocketAddr>,
    /// What is in it.
    pub left: Left,
}

/// What is left in a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Left {
    /// So many bytes of datagrams that nobody has read, with what the kernel needs for each.
    Datagrams(u32),
    /// So many connections that nobody has accepted.
    Connections(u32),
    /// A connection that its peer has not finished opening.
    Opening,
}

impl std::fmt::Display for Undrained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Tcp => "TCP",
            Kind::Udp => "UDP",
        };
        write!(f, "{kind} {}", self.local)?;
        if let Some(remote) = self.remote {
            write!(f, " from {remote}")?;
        }
        match self.left {
            Left::Datagrams(bytes) => write!(f, ": datagrams, in {bytes} bytes"),
            Left::Connections(1) => write!(f, ": 1 connection that was not accepted"),
            Left::Connections(many) => write!(f, ": {many} connections that were not accepted"),
            Left::Opening => write!(f, ": a connection that was being opened"),
        }
    }
}

/// The sockets of a container, while they run empty.
#[derive(Debug)]
pub(super) struct Drainage {
    diagnosis: Diagnosis,
    within: Duration,
    found: Drain,
}

impl Drainage {
    /// Of the container whose process this is, for at most this long in all.
    pub(super) fn of(pid: u32, within: Duration) -> Result<Drainage> {
        Ok(Drainage {
            diagnosis: Diagnosis::open(&Namespace::of_pid(pid)?)?,
            within,
            found: Drain::default(),
        })
    }

    /// Newcomers wait: lets connections that are being opened become established and be accepted.
    /// Takes at most half of the time there is.
    pub(super) async fn opening(&mut self) -> Result<()> {
        let began = Instant::now();
        let deadline = began + self.within / 2;
        while self
            .look_at_connections()?
            .iter()
            .any(|it| it.kind == Kind::Tcp)
            && Instant::now() < deadline
        {
            tokio::time::sleep(LOOK).await;
        }
        self.found.opening = began.elapsed();
        Ok(())
    }

    /// Everything waits: lets what has arrived be read.
    pub(super) async fn arrived(mut self) -> Result<Drain> {
        let began = Instant::now();
        let deadline = began + (self.within.saturating_sub(self.found.opening));
        // What passed the switch just before it was thrown may still be on its way to its socket.
        let mut under_way = Backlog::begin();
        loop {
            let passed = under_way.has_passed();
            let mut left = self.look_at_datagrams()?;
            left.extend(self.look_at_connections()?);
            if (passed && left.is_empty()) || Instant::now() >= deadline {
                self.found.left = left;
                self.found.arrived = began.elapsed();
                return Ok(self.found);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn look_at_datagrams(&mut self) -> Result<Vec<Undrained>> {
        let sockets = self.diagnosis.look(Kind::Udp, StateSet::ALL)?;
        let buffers = sockets.iter().filter_map(|socket| socket.receive_buffer);
        self.found.dropped_before = buffers.map(|buffer| buffer.drops).sum();
        Ok(sockets.iter().filter_map(undrained).collect())
    }

    fn look_at_connections(&mut self) -> Result<Vec<Undrained>> {
        let mut sockets = self.diagnosis.look(Kind::Tcp, StateSet::LISTENING)?;
        // Where nothing listens, nothing is being opened; and the other look costs more.
        if !sockets.is_empty() {
            sockets.extend(self.diagnosis.look(Kind::Tcp, StateSet::OPENING)?);
        }
        Ok(sockets.iter().filter_map(undrained).collect())
    }
}

fn undrained(socket: &Socket) -> Option<Undrained> {
    let left = match (socket.kind, socket.state) {
        (Kind::Tcp, State::SynReceived | State::NewSynReceived) => Left::Opening,
        (Kind::Tcp, State::Listen) if socket.receive_queue > 0 => {
            Left::Connections(socket.receive_queue)
        }
        (Kind::Udp, _) if socket.receive_queue > 0 => Left::Datagrams(socket.receive_queue),
        _ => return None,
    };
    Some(Undrained {
        kind: socket.kind,
        local: socket.local,
        remote: (socket.remote.port() != 0).then_some(socket.remote),
        left,
    })
}
