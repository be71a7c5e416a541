//! The mock backend of `vhost-user-backend`'s own tests, as its package holds it, as a device in this process. Its assertions
//! are the contract: which memory it is shown, and what is asked of its configuration space. The package's tests, over the
//! crate's own daemon, come with it; where one of those fails, upstream is to be asked.

#[allow(unexpected_cfgs, warnings, reason = "what is included is not ours")]
mod upstream {
    include!(env!("UPSTREAM_TESTS"));

    #[warn(clippy::all, unused)]
    mod hosted {
        use std::time::{Duration, Instant};

        use ringvm_backends::device::{Device, DeviceError, QueueParts, QueueState};
        use ringvm_backends::testing::driver::{Buffer, Driver};
        use ringvm_hosted::Hosted;
        use vm_memory::{GuestAddress, GuestMemoryMmap};

        use super::*;

        const LIMIT: Duration = Duration::from_secs(60);
        /// Where that backend wants its memory, and how much.
        const MEMORY: u64 = 0x10_0000;

        #[test]
        fn the_mock_backend_of_vhost_user_backend_is_served() {
            let backend = Arc::new(Mutex::new(MockVhostBackend::new()));
            let mut device = Hosted::new("mock0", 42, 0x208, Arc::clone(&backend)).unwrap();
            let features = device.info().features;
            device.ack_features(features).unwrap();
            assert_eq!(backend.lock().unwrap().acked_features, features);
            assert!(backend.lock().unwrap().event_idx, "it was told of the event index");

            let mut space = [0; 8];
            device.read_config(0x200, &mut space);
            assert_eq!(space, [0xa5; 8]);
            device.write_config(0x200, &space).unwrap();

            let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(MEMORY), MEMORY as usize)]).unwrap());
            let mut driver = Driver::new(Arc::clone(&memory), MEMORY, 256, features);
            let kick = EventFd::new(0).unwrap();
            let parts = || QueueParts::new(driver.ring(), Arc::clone(&memory), kick.try_clone().unwrap());
            device.start_queue(0, parts()).unwrap();
            // Both of its threads serve the first queue, and none the second.
            let refused = device.start_queue(1, parts()).unwrap_err();
            assert!(matches!(refused, DeviceError::Queue { index: 1, .. }), "{refused}");

            driver.add(&[Buffer { addr: MEMORY + 0x1_0000, len: 16, writable: false }]).unwrap();
            driver.publish();
            let begun = Instant::now();
            let before = backend.lock().unwrap().events;
            kick.write(1).unwrap();
            while backend.lock().unwrap().events == before {
                assert!(begun.elapsed() < LIMIT, "it is called for the kick");
                thread::yield_now();
            }
            // It takes nothing from its queue.
            assert_eq!(device.drain(0).unwrap(), QueueState { next_avail: 0, next_used: 0 });
            device.reset();
        }
    }
}
