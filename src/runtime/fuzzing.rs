//! The door to the private readers: see [`crate::fuzzing`].

use super::rendezvous::{Call, Order, Outcome, line};
use crate::fuzzing::read;

/// A message between livemig and the wrapper.
pub(crate) fn read_message(which: u8, json: &[u8]) {
    match which % 3 {
        0 => drop(read::<Call>(json).inspect(|call| {
            let line = line(call).expect("what was read can be written");
            // Else the other side would see two.
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let _ = (call.invocation.image_path(), call.invocation.pid_file());
            let _ = call.invocation.clone().with_flag("--leave-running");
        })),
        1 => drop(read::<Order>(json)),
        _ => drop(read::<Outcome>(json)),
    }
}
