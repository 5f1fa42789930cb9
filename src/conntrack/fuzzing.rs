//! The door to the private readers: see [`crate::fuzzing`].

use super::hold::Notice;
use super::{Entry, events};
use crate::fuzzing::read_flows;
use crate::netlink::Message;

/// An entry, and what becomes of it on its way to another host.
pub(crate) fn entry(message: &Message<'_>) {
    let _ = events::read(message);
    let Some(entry) = Entry::decode(message) else {
        return;
    };
    let _ = (entry.to_string(), entry.is_over());
    written(&entry);
    for container in [entry.original.source, entry.reply.source] {
        assert!(entry.concerns(container));
        let flows = entry.flow_of(container).into_iter().collect();
        read_flows(&crate::agent::protocol::Flows { flows });
    }
}

/// What is written into the table can be read from it, and is the same connection.
pub(crate) fn written(entry: &Entry) {
    let _ = entry.encode_translated();
    let again = Entry::decode_body(entry.encode().as_bytes());
    let again = again.expect("what is written can be read");
    assert_eq!((again.original, again.reply), (entry.original, entry.reply));
    assert_eq!(
        (again.mark, again.zone, again.sctp),
        (entry.mark, entry.zone, entry.sctp)
    );
}

/// What is told about a packet that waits.
pub(crate) fn notice(message: &Message<'_>) {
    if let Some(notice) = Notice::read(message) {
        let _ = notice.header.is_udp();
    }
}

/// Entries as they are written.
#[cfg(test)]
pub(crate) fn bodies(entries: &[Entry]) -> Vec<crate::netlink::Body> {
    entries.iter().map(Entry::encode).collect()
}
