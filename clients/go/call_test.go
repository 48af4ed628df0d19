package keyturn_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

var platform = map[string]string{"Authorization": "Bearer platform"}

// ownKey answers with the user's own key first, and with a ticket where that was refused.
func ownKey(context.Context, *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
	return keyAnswer(), nil
}

func ownKeyThenCredits(_ context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
	if len(r.GetFailedKeyHandles()) > 0 {
		return ticketAnswer(), nil
	}
	return keyAnswer(), nil
}

func begin(t *testing.T, client *keyturn.Client) *keyturn.Call {
	t.Helper()
	call, err := client.Request(t.Context(), request())
	require(t, err)
	t.Cleanup(call.Close)
	return call
}

func TestWhatACallRecords(t *testing.T) {
	gone := func(call *keyturn.Call) error { _, err := call.Headers(platform); return err }
	used := func(call *keyturn.Call) error {
		return errors.Join(
			call.Used(keyturn.Usage{InputTokens: new(int64(1)), OutputTokens: new(int64(2))}),
			call.Used(keyturn.Usage{OutputTokens: new(int64(5)), CacheReadTokens: new(int64(0))}),
		)
	}
	wait := 20 * time.Second
	failed := func(call *keyturn.Call) error {
		return call.Failed(keyturn.Failure{
			Outcome: keyturn.OutcomeRateLimited, HTTPStatus: 429, ErrorMessage: "slow down", RetryAfter: &wait,
		})
	}
	succeeded := (*keyturn.Call).Succeeded
	noted := func(call *keyturn.Call) error {
		return errors.Join(
			call.Note(keyturn.Note{Model: "gpt-4o", HTTPStatus: 200}),
			call.Note(keyturn.Note{Endpoint: "/v1", ResponseTime: time.Second}),
		)
	}
	usage := &keyturnv1.Usage{InputTokens: 1, OutputTokens: 5}
	limited := &keyturnv1.RecordRequest{
		Outcome: keyturnv1.Outcome_OUTCOME_RATE_LIMITED, HttpStatus: 429, ErrorMessage: "slow down", RetryAfter: durationpb.New(wait),
	}
	for name, each := range map[string]struct {
		steps []func(*keyturn.Call) error
		want  *keyturnv1.RecordRequest
	}{
		"nothing":        {nil, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_NEVER_SENT}},
		"only a note":    {[]func(*keyturn.Call) error{noted}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_NEVER_SENT, Model: "gpt-4o", HttpStatus: 200, Endpoint: "/v1", ResponseTime: durationpb.New(time.Second)}},
		"headers":        {[]func(*keyturn.Call) error{gone}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED}},
		"the secret":     {[]func(*keyturn.Call) error{func(call *keyturn.Call) error { _, err := call.Secret(); return err }}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED}},
		"sending":        {[]func(*keyturn.Call) error{(*keyturn.Call).Sending}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED}},
		"tokens":         {[]func(*keyturn.Call) error{used}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED, Usage: usage}},
		"a cost":         {[]func(*keyturn.Call) error{func(call *keyturn.Call) error { return call.Cost(0) }}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_CLIENT_CANCELLED, CostMicros: new(int64(0))}},
		"success":        {[]func(*keyturn.Call) error{gone, used, succeeded}, &keyturnv1.RecordRequest{Outcome: keyturnv1.Outcome_OUTCOME_SUCCESS, Usage: usage}},
		"failure":        {[]func(*keyturn.Call) error{gone, failed}, limited},
		"failure, later": {[]func(*keyturn.Call) error{failed, succeeded}, limited},
	} {
		s := serve(t, &sidecar{})
		client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
		call := begin(t, client)
		for _, step := range each.steps {
			require(t, step(call))
		}
		call.Close()
		call.Close() // once is enough
		client.Close()
		records := s.records()
		equal(t, name+": records", len(records), 1)
		each.want.Settles = &keyturnv1.RecordRequest_CreditTicket{CreditTicket: ticketText}
		if !proto.Equal(records[0], each.want) {
			t.Errorf("%s: recorded %v, want %v", name, records[0], each.want)
		}
	}
}

func TestFinishRecordsInTheForeground(t *testing.T) {
	s := serve(t, &sidecar{onDecide: ownKey})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	headers, err := call.Headers(platform)
	require(t, err)
	equal(t, "the own key's header", headers["Authorization"], "Bearer "+secretText)
	secret, err := call.Secret()
	require(t, err)
	equal(t, "the secret", secret.Reveal(), secretText)
	recorded, err := call.Finish(t.Context())
	require(t, err)
	equal(t, "charged", recorded.ChargedMicros, 20_000)
	records := requests[*keyturnv1.RecordRequest](s)
	equal(t, "outcome", records[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
	equal(t, "handle", records[0].GetKeyHandle(), handleText)
	call.Close()
	client.Close()
	equal(t, "records", len(s.records()), 1)
}

func TestFinishRecordsAFailureAsOne(t *testing.T) {
	s := serve(t, &sidecar{})
	call := begin(t, s.open(t, keyturn.Options{}))
	require(t, call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeTimeout}))
	_, err := call.Finish(t.Context())
	require(t, err)
	equal(t, "outcome", s.records()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_TIMEOUT)
}

func TestAFinishThatFailsLeavesTheRecordWithTheCaller(t *testing.T) {
	s := serve(t, &sidecar{onRecord: scripted[keyturnv1.RecordRequest](recordAnswer, fault(codes.ResourceExhausted, "OVERLOADED"))})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	_, err := call.Finish(t.Context())
	equal(t, "overloaded", errors.Is(err, keyturn.ErrResourceExhausted), true)
	_, err = client.Record(t.Context(), *call.Unrecorded())
	require(t, err)
	equal(t, "the same record", proto.Equal(s.records()[0], s.records()[1]), true)
}

func TestAFinishWhoseCallerWentAwayIsCarriedOn(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := call.Finish(ctx)
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	require(t, client.Flush(t.Context()))
	equal(t, "records", len(s.records()), 1)
	equal(t, "outcome", s.records()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_SUCCESS)
}

func TestWhenCreditsPayThePlatformSigns(t *testing.T) {
	call := begin(t, serve(t, &sidecar{}).open(t, keyturn.Options{}))
	headers, err := call.Headers(platform)
	require(t, err)
	equal(t, "header", headers["Authorization"], "Bearer platform")
	headers["X"] = "mine"
	equal(t, "the caller's own map", len(platform), 1)
	secret, err := call.Secret()
	require(t, err)
	if secret != nil {
		t.Error("there is a secret although credits pay")
	}
	equal(t, "ticket", call.Ticket().HoldMicros, 50_000)
}

func TestADenialIsAnErrorOfItsOwn(t *testing.T) {
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](denialAnswer)})
	client := s.open(t, keyturn.Options{WhenDown: func(context.Context, keyturn.DecideRequest, *keyturn.Error) (bool, error) {
		t.Error("WhenDown was asked about a denial")
		return true, nil
	}})
	_, err := client.Request(t.Context(), request())
	denied, ok := errors.AsType[*keyturn.DeniedError](err)
	if !ok {
		t.Fatalf("got %v, want a *DeniedError", err)
	}
	equal(t, "reason", denied.Decision.Denial.Reason, keyturn.DenialReasonRateLimited)
	equal(t, "text", err.Error(), "keyturn: denied: RATE_LIMITED: Only credits may pay.")
	client.Close()
	equal(t, "records", len(s.records()), 0)
}

func TestACallThatEndedTakesNothing(t *testing.T) {
	s := serve(t, &sidecar{onDecide: ownKey})
	call := begin(t, s.open(t, keyturn.Options{}))
	call.Close()
	_, headers := call.Headers(platform)
	_, secret := call.Secret()
	_, finish := call.Finish(t.Context())
	for i, err := range []error{
		headers, secret, finish, call.Sending(), call.Used(keyturn.Usage{}), call.Cost(1), call.Note(keyturn.Note{}),
		call.Succeeded(), call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeTimeout}), call.KeyRefused(t.Context(), keyturn.Failure{}),
	} {
		if !errors.Is(err, keyturn.ErrEnded) {
			t.Errorf("%d: got %v, want ErrEnded", i, err)
		}
	}
	equal(t, "what can be read", call.Key().KeyID, "k1")
	if call.RequestID() == "" || call.Decision() == nil {
		t.Error("the request id or the decision cannot be read")
	}
}

func TestASuccessIsNoFailure(t *testing.T) {
	call := begin(t, serve(t, &sidecar{onDecide: ownKey}).open(t, keyturn.Options{}))
	for i, err := range []error{
		call.Failed(keyturn.Failure{Outcome: keyturn.OutcomeSuccess}), call.Failed(keyturn.Failure{}),
		call.KeyRefused(t.Context(), keyturn.Failure{Outcome: keyturn.OutcomeSuccess}),
	} {
		if !errors.Is(err, keyturn.ErrInvalid) {
			t.Errorf("%d: got %v, want ErrInvalid", i, err)
		}
	}
	require(t, call.Sending())
}

func TestARefusedKeyIsRecordedAndLeftOut(t *testing.T) {
	s := serve(t, &sidecar{onDecide: ownKeyThenCredits})
	call := begin(t, s.open(t, keyturn.Options{}))
	require(t, call.Used(keyturn.Usage{InputTokens: new(int64(9))}))
	require(t, call.KeyRefused(t.Context(), keyturn.Failure{ErrorMessage: "bad key"}))
	equal(t, "the new decision", call.Ticket().HoldMicros, 50_000)
	_, err := call.Finish(t.Context())
	require(t, err)
	decisions, records := requests[*keyturnv1.DecideRequest](s), s.records()
	equal(t, "the same request", decisions[1].GetRequestId(), decisions[0].GetRequestId())
	equal(t, "the key that is left out", decisions[1].GetFailedKeyHandles()[0], handleText)
	want := &keyturnv1.RecordRequest{
		Settles: &keyturnv1.RecordRequest_KeyHandle{KeyHandle: handleText}, Outcome: keyturnv1.Outcome_OUTCOME_AUTH_REJECTED,
		HttpStatus: 401, ErrorMessage: "bad key", Usage: &keyturnv1.Usage{InputTokens: 9},
	}
	if !proto.Equal(records[0], want) {
		t.Errorf("recorded %v, want %v", records[0], want)
	}
	want = &keyturnv1.RecordRequest{
		Settles: &keyturnv1.RecordRequest_CreditTicket{CreditTicket: ticketText}, Outcome: keyturnv1.Outcome_OUTCOME_SUCCESS,
	}
	if !proto.Equal(records[1], want) {
		t.Errorf("recorded %v, want nothing noted about the new route: %v", records[1], want)
	}
}

func TestARefusedKeyWithNobodyElseToPayIsDenied(t *testing.T) {
	s := serve(t, &sidecar{onDecide: func(ctx context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		if len(r.GetFailedKeyHandles()) > 0 {
			return denialAnswer(), nil
		}
		return keyAnswer(), nil
	}})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	err := call.KeyRefused(t.Context(), keyturn.Failure{Outcome: keyturn.OutcomeRateLimited, HTTPStatus: 429})
	if _, ok := errors.AsType[*keyturn.DeniedError](err); !ok {
		t.Fatalf("got %v, want a *DeniedError", err)
	}
	equal(t, "ended", errors.Is(call.Sending(), keyturn.ErrEnded), true)
	call.Close()
	client.Close()
	equal(t, "records", len(s.records()), 1)
	equal(t, "outcome", s.records()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_RATE_LIMITED)
}

func TestCreditsAreNoKeyToRefuse(t *testing.T) {
	call := begin(t, serve(t, &sidecar{}).open(t, keyturn.Options{}))
	equal(t, "invalid", errors.Is(call.KeyRefused(t.Context(), keyturn.Failure{}), keyturn.ErrInvalid), true)
	require(t, call.Sending())
}

func TestARefusalThatIsNotRecordedIsRecordedByTheCallsEnd(t *testing.T) {
	s := serve(t, &sidecar{
		onDecide: ownKey, onRecord: scripted[keyturnv1.RecordRequest](recordAnswer, fault(codes.ResourceExhausted, "OVERLOADED")),
	})
	client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
	call := begin(t, client)
	err := call.KeyRefused(t.Context(), keyturn.Failure{})
	equal(t, "overloaded", errors.Is(err, keyturn.ErrResourceExhausted), true)
	call.Close()
	client.Close()
	records := s.records()
	equal(t, "records", len(records), 2)
	equal(t, "the same record", proto.Equal(records[0], records[1]), true)
	equal(t, "decisions", len(requests[*keyturnv1.DecideRequest](s)), 1)
}

func TestARefusalWhoseCallerWentAwayIsCarriedOn(t *testing.T) {
	s := serve(t, &sidecar{onDecide: ownKey})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	equal(t, "canceled", errors.Is(call.KeyRefused(ctx, keyturn.Failure{}), context.Canceled), true)
	call.Close()
	require(t, client.Flush(t.Context()))
	equal(t, "records", len(s.records()), 1)
	equal(t, "outcome", s.records()[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_AUTH_REJECTED)
}

func TestACallThatIsClosedWhileItDecidesAgainLeavesNoHoldBehind(t *testing.T) {
	came, release := make(chan struct{}), make(chan struct{})
	s := serve(t, &sidecar{onDecide: func(_ context.Context, r *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		if len(r.GetFailedKeyHandles()) == 0 {
			return keyAnswer(), nil
		}
		close(came)
		<-release
		return ticketAnswer(), nil
	}})
	client := s.open(t, keyturn.Options{})
	call := begin(t, client)
	go func() {
		<-came
		call.Close()
		close(release)
	}()
	equal(t, "ended", errors.Is(call.KeyRefused(t.Context(), keyturn.Failure{}), keyturn.ErrEnded), true)
	require(t, client.Flush(t.Context()))
	equal(t, "records", len(s.records()), 2)
	for _, record := range s.records() {
		if record.GetCreditTicket() != "" {
			equal(t, "outcome", record.GetOutcome(), keyturnv1.Outcome_OUTCOME_NEVER_SENT)
		}
	}
}

func TestAnUnmeteredCallRecordsNothing(t *testing.T) {
	s := serve(t, &sidecar{onDecide: func(context.Context, *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		return nil, unavailable("STORE_UNAVAILABLE")
	}})
	client := s.open(t, keyturn.Options{
		Retries:  keyturn.Retries{Attempts: 1},
		WhenDown: func(context.Context, keyturn.DecideRequest, *keyturn.Error) (bool, error) { return true, nil },
	})
	finished, closed := begin(t, client), begin(t, client)
	headers, err := finished.Headers(platform)
	require(t, err)
	equal(t, "the platform signs", headers["Authorization"], "Bearer platform")
	recorded, err := finished.Finish(t.Context())
	require(t, err)
	if recorded != nil {
		t.Errorf("recorded %v", recorded)
	}
	require(t, closed.Succeeded())
	closed.Close()
	client.Close()
	equal(t, "records", len(s.records()), 0)
}

func TestACallIsUsedByManyGoroutines(t *testing.T) {
	s := serve(t, &sidecar{onDecide: ownKey})
	client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
	call := begin(t, client)
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			_ = call.Used(keyturn.Usage{InputTokens: new(int64(i))})
			_ = call.Note(keyturn.Note{Model: "m"})
			_ = call.String()
			if i == 7 {
				_ = call.KeyRefused(t.Context(), keyturn.Failure{})
				call.Close()
			}
		})
	}
	all.Wait()
	client.Close()
	if len(s.records()) < 1 {
		t.Error("nothing was recorded")
	}
}
