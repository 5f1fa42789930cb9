//! Every bound of the agent and of its callers, in one place.

use std::time::Duration;

/// What the agent and its callers accept, and how long they wait.
///
/// The defaults are meant for hosts in one data centre or across a continent. What an agent can be
/// made to hold for callers it does not know is `handshakes` times some 70 KiB (TLS accepts no
/// handshake message above 64 KiB); for peers it is `connections` times about 1 MiB: `head` and
/// `read_buffer` for HTTP, two times `tls_buffer` for TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Connections of peers that are served at one time. 64.
    pub connections: usize,
    /// Connections that one peer may have at one time, so that no peer can shut out another. 16.
    pub connections_per_peer: usize,
    /// Connections at one time that have not proved to be a peer's: in their handshake, or about
    /// to join. One more pushes out the oldest of the address that has most of them. 32.
    pub handshakes: usize,
    /// Requests in work at one time, also those whose caller has gone. 64.
    pub requests: usize,
    /// Peers that a host can know. 256.
    pub peers: usize,
    /// Invitations that can be open at one time. 32.
    pub invites: usize,
    /// The longest time for which an invitation can be open. 7 days.
    pub invite: Duration,

    /// The head of a request or of an answer, in bytes. 16 KiB.
    pub head: usize,
    /// Header lines in a head. 64.
    pub header_lines: usize,
    /// A JSON body, in bytes. 1 MiB.
    pub json: usize,
    /// The body of a request to join, in bytes. 4 KiB.
    pub join: usize,
    /// What is read from a connection and not yet taken by whoever handles it, in bytes; the
    /// largest piece in which a body arrives. 256 KiB.
    pub read_buffer: usize,
    /// Ciphertext that waits for the socket, and ciphertext that is read at once, in bytes each.
    /// 256 KiB.
    pub tls_buffer: usize,

    /// For a TCP connection to be made. 5 s.
    pub connect: Duration,
    /// For a TLS handshake. 5 s.
    pub handshake: Duration,
    /// For the head of a request, from its first byte to its last. 10 s.
    pub head_time: Duration,
    /// For everything that a caller who is not yet a peer does: hello and join. 10 s.
    pub join_time: Duration,
    /// For a JSON body, from the end of the head to its last byte. 10 s.
    pub json_time: Duration,
    /// For the answer to a call, unless the call says otherwise. 30 s.
    pub answer: Duration,
    /// Without a byte, in either direction, in the middle of a stream. 30 s.
    pub stall: Duration,
    /// Between two requests on one connection. 5 min.
    pub idle: Duration,
    /// For which the rest of a request is read and thrown away after it was refused, so that the
    /// refusal reaches the caller instead of a reset. 2 s.
    pub linger: Duration,
    /// For which requests in work may go on after the agent was told to stop. 10 s.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        const KIB: usize = 1024;
        const MIB: usize = 1024 * KIB;
        Limits {
            connections: 64,
            connections_per_peer: 16,
            handshakes: 32,
            requests: 64,
            peers: 256,
            invites: 32,
            invite: Duration::from_secs(7 * 24 * 3600),
            head: 16 * KIB,
            header_lines: 64,
            json: MIB,
            join: 4 * KIB,
            read_buffer: 256 * KIB,
            tls_buffer: 256 * KIB,
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            head_time: Duration::from_secs(10),
            join_time: Duration::from_secs(10),
            json_time: Duration::from_secs(10),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(30),
            idle: Duration::from_secs(300),
            linger: Duration::from_secs(2),
            drain: Duration::from_secs(10),
        }
    }
}
