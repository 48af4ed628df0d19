package keyturn

import (
	"testing"
	"time"
)

func TestJitterGrowsToItsLimit(t *testing.T) {
	retries := Retries{}.withDefaults()
	for made, limit := range map[int]time.Duration{
		1: 100 * time.Millisecond, 2: 200 * time.Millisecond, 4: 800 * time.Millisecond, 5: time.Second, 30: time.Second, 1000: time.Second,
	} {
		longest := time.Duration(0)
		for range 2000 {
			wait := retries.jitter(made)
			if wait < 0 || wait > limit {
				t.Fatalf("after %d attempts it waits %v", made, wait)
			}
			longest = max(longest, wait)
		}
		if longest < limit/2 {
			t.Errorf("after %d attempts it waits %v at most", made, longest)
		}
	}
}

func TestAFirstDelayBeyondTheLimitIsTheLimit(t *testing.T) {
	retries := Retries{FirstDelay: 1 << 62, MaxDelay: time.Second}.withDefaults()
	for made := range 70 {
		if wait := retries.jitter(made + 1); wait < 0 || wait > time.Second {
			t.Fatalf("after %d attempts it waits %v", made+1, wait)
		}
	}
}

func TestJitterGivesWayToTheDeadlineAndWhatIsAskedForDoesNot(t *testing.T) {
	const s = time.Second
	for _, each := range []struct {
		asked, jitter, left, wait time.Duration
		fits                      bool
	}{
		{0, 1 * s, 2 * s, 1 * s, true},
		{1 * s, 2 * s, 4 * s, 3 * s, true},
		{1 * s, 2 * s, 3 * s, 1 * s, true}, // without jitter
		{1 * s, 2 * s, 1 * s, 0, false},
		{0, 2 * s, 1 * s, 0, false}, // none was asked for
		{0, 0, 0, 0, false},
		{5 * s, 0, -1 * s, 0, false},
	} {
		wait, fits := fit(each.asked, each.jitter, each.left)
		if wait != each.wait || fits != each.fits {
			t.Errorf("%+v: got %v, %v", each, wait, fits)
		}
	}
}
