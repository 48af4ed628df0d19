package keyturn_test

import (
	"context"
	"errors"
	"math"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/keyturn/keyturn/clients/go"
	keyturnv1 "github.com/keyturn/keyturn/clients/go/keyturn/v1"
)

func TestADecisionHasWhatTheSidecarAnswered(t *testing.T) {
	answers := []*keyturnv1.DecideResponse{keyAnswer(), ticketAnswer(), denialAnswer(), {Mode: 77, Reason: 88}}
	s := serve(t, &sidecar{onDecide: func(context.Context, *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		answer := answers[0]
		answers = answers[1:]
		return answer, nil
	}})
	client := s.open(t, keyturn.Options{})
	decide := func() *keyturn.Decision {
		decision, err := client.Decide(t.Context(), request())
		require(t, err)
		return decision
	}
	own := decide()
	equal(t, "mode", own.Mode, keyturn.ModeBYOKFirst)
	equal(t, "reason", own.Reason, keyturn.ReasonBYOKFirstOwnKey)
	equal(t, "handle", own.Key.Handle.Text(), handleText)
	headers, err := own.Key.Headers()
	require(t, err)
	equal(t, "header", headers["Authorization"], "Bearer "+secretText)
	equal(t, "allowed", own.Allowed(), true)

	credits := decide()
	equal(t, "ticket", credits.Ticket.Ticket.Text(), ticketText)
	equal(t, "hold", credits.Ticket.HoldMicros, 50_000)
	equal(t, "allowed", credits.Allowed(), true)

	denied := decide()
	equal(t, "denial", *denied.Denial, keyturn.Denial{
		Reason: keyturn.DenialReasonRateLimited, Retryable: true, RetryAfter: 1500 * time.Millisecond, Suggestion: "Wait.",
	})
	equal(t, "allowed", denied.Allowed(), false)

	newer := decide()
	equal(t, "a mode of a newer sidecar", newer.Mode.String(), "UNRECOGNIZED_77")
	equal(t, "a reason of it", newer.Reason.String(), "UNRECOGNIZED_88")
	equal(t, "a route of it is allowed", newer.Allowed(), false)
}

func TestADecisionAsksForTheSecretInline(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	asked := keyturn.DecideRequest{
		UserID: "u1", Provider: "openai", Model: "gpt-4o", ServiceType: "agents", RequestID: "r1",
		InputTokens: new(int64(7)), Constraint: keyturn.ConstraintCreditsOnly, HoldTTL: 90 * time.Second,
		FailedKeys: []keyturn.SealedHandle{keyturn.NewSealedHandle("h1")},
	}
	_, err := client.Decide(t.Context(), asked)
	require(t, err)
	asked.InputTokens, asked.CostMicros, asked.Redeem = nil, new(int64(0)), true
	_, err = client.Decide(t.Context(), asked)
	require(t, err)
	want := &keyturnv1.DecideRequest{
		UserId: "u1", Provider: "openai", Model: "gpt-4o", ServiceType: "agents", RequestId: "r1",
		Estimate:   &keyturnv1.DecideRequest_Tokens{Tokens: &keyturnv1.TokenEstimate{InputTokens: 7}},
		Constraint: keyturnv1.Constraint_CONSTRAINT_CREDITS_ONLY, HoldTtl: durationpb.New(90 * time.Second),
		FailedKeyHandles: []string{"h1"}, KeyDelivery: keyturnv1.KeyDelivery_KEY_DELIVERY_INLINE,
	}
	sent := requests[*keyturnv1.DecideRequest](s)
	if !proto.Equal(sent[0], want) {
		t.Errorf("sent %v, want %v", sent[0], want)
	}
	want.Estimate = &keyturnv1.DecideRequest_CostMicros{CostMicros: 0}
	want.KeyDelivery = keyturnv1.KeyDelivery_KEY_DELIVERY_REDEEM
	if !proto.Equal(sent[1], want) {
		t.Errorf("sent %v, want %v", sent[1], want)
	}
}

func TestADecisionWithoutARequestIDGetsANewUUID(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	for range 2 {
		_, err := client.Decide(t.Context(), request())
		require(t, err)
	}
	_, err := client.DecideMany(t.Context(), []keyturn.DecideRequest{request(), request()})
	require(t, err)
	sent := append(requests[*keyturnv1.DecideRequest](s), requests[*keyturnv1.BatchDecideRequest](s)[0].GetRequests()...)
	seen := map[string]bool{}
	for _, each := range sent {
		if !regexp.MustCompile(`^[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}$`).MatchString(each.GetRequestId()) {
			t.Errorf("%q is no UUIDv4 in hex", each.GetRequestId())
		}
		seen[each.GetRequestId()] = true
	}
	equal(t, "different ids", len(seen), 4)
}

func TestWhatCannotBeSentIsRefusedBeforeItIsSent(t *testing.T) {
	s := serve(t, &sidecar{})
	client, ctx := s.open(t, keyturn.Options{}), t.Context()
	both := request()
	both.CostMicros, both.MaxOutputTokens = new(int64(1)), new(int64(1))
	garbled := request()
	garbled.Model = "\xff" + secretText
	record := func(settles keyturn.Settles) error {
		_, err := client.Record(ctx, keyturn.RecordRequest{Settles: settles, Outcome: keyturn.OutcomeSuccess})
		return err
	}
	large := ticketRecord()
	large.Endpoint = strings.Repeat("x", 1<<17)
	_, decideBoth := client.Decide(ctx, both)
	_, decideGarbled := client.Decide(ctx, garbled)
	_, manyBoth := client.DecideMany(ctx, []keyturn.DecideRequest{request(), both})
	_, explainBoth := client.Explain(ctx, both)
	_, requestBoth := client.Request(ctx, both)
	_, noTimeout := client.Decide(ctx, request(), keyturn.WithTimeout(0))
	_, manyNil := client.RecordMany(ctx, []keyturn.RecordRequest{{}})
	_, manyStatus := client.RecordMany(ctx, []keyturn.RecordRequest{{Settles: keyturn.NewSealedTicket("t"), HTTPStatus: math.MaxInt64}})
	_, redeemGarbled := client.Redeem(ctx, keyturn.NewSealedHandle("\xff"))
	for what, err := range map[string]error{
		"a cost and tokens":        decideBoth,
		"text that is not UTF-8":   decideGarbled,
		"one of many":              manyBoth,
		"of an explanation":        explainBoth,
		"of a call":                requestBoth,
		"a timeout of zero":        noTimeout,
		"nothing to settle":        manyNil,
		"a status beyond 32 bits":  manyStatus,
		"a garbled handle":         redeemGarbled,
		"a denied decision":        record(&keyturn.Decision{Denial: &keyturn.Denial{}}),
		"a nil decision":           record((*keyturn.Decision)(nil)),
		"an unmetered decision":    record(&keyturn.Decision{Unmetered: true}),
		"a record that is garbled": client.RecordLater(keyturn.RecordRequest{Settles: keyturn.NewSealedTicket("\xff")}),
		"a record that is large":   client.RecordLater(large),
	} {
		if !errors.Is(err, keyturn.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", what, err)
		} else if strings.Contains(err.Error(), secretText) {
			t.Errorf("%s: the error quotes it", what)
		}
	}
	equal(t, "what was sent", len(s.asked), 0)
}

func TestNothingIsSentForNoItems(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	decided, err := client.DecideMany(t.Context(), nil)
	require(t, err)
	recorded, err := client.RecordMany(t.Context(), nil)
	require(t, err)
	equal(t, "answers", len(decided)+len(recorded)+len(s.asked), 0)
}

func TestARecordSaysWhatIsKnownAndNothingElse(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	for _, record := range []keyturn.RecordRequest{
		ticketRecord(),
		{
			Settles: &keyturn.Decision{Key: &keyturn.KeyHandle{Handle: keyturn.NewSealedHandle("h1")}}, Outcome: 99,
			Usage:      &keyturn.Usage{OutputTokens: new(int64(5)), TotalTokens: new(int64(0))},
			CostMicros: new(int64(0)), Model: "m", Endpoint: "/e", ResponseTime: time.Second, HTTPStatus: 503,
			ErrorMessage: strings.Repeat("ü", 600), RetryAfter: new(time.Duration(0)),
		},
		{Settles: &keyturn.CreditTicket{Ticket: keyturn.NewSealedTicket("t1")}, Outcome: keyturn.OutcomeRefused,
			Usage: &keyturn.Usage{}, ErrorMessage: "\xffgarbled"},
	} {
		recorded, err := client.Record(t.Context(), record)
		require(t, err)
		equal(t, "charged", recorded.ChargedMicros, 20_000)
		equal(t, "balance", *recorded.BalanceMicros, 980_000)
		equal(t, "cost source", recorded.CostSource, keyturn.CostSourcePriced)
	}
	want := []*keyturnv1.RecordRequest{
		{Settles: &keyturnv1.RecordRequest_CreditTicket{CreditTicket: ticketText}, Outcome: keyturnv1.Outcome_OUTCOME_SUCCESS},
		{
			Settles: &keyturnv1.RecordRequest_KeyHandle{KeyHandle: "h1"}, Outcome: 99,
			Usage:      &keyturnv1.Usage{OutputTokens: 5, TotalTokens: new(int64(0))},
			CostMicros: new(int64(0)), Model: "m", Endpoint: "/e", ResponseTime: durationpb.New(time.Second), HttpStatus: 503,
			ErrorMessage: strings.Repeat("ü", 500), RetryAfter: durationpb.New(0),
		},
		{Settles: &keyturnv1.RecordRequest_CreditTicket{CreditTicket: "t1"}, Outcome: keyturnv1.Outcome_OUTCOME_REFUSED,
			ErrorMessage: "\uFFFDgarbled"},
	}
	for i, sent := range requests[*keyturnv1.RecordRequest](s) {
		if !proto.Equal(sent, want[i]) {
			t.Errorf("record %d: sent %v, want %v", i, sent, want[i])
		}
	}
}

func TestExplainTellsTheWay(t *testing.T) {
	explanation, err := serve(t, &sidecar{}).open(t, keyturn.Options{}).Explain(t.Context(), request())
	require(t, err)
	equal(t, "reason", explanation.Decision.Reason, keyturn.ReasonCreditFirstCredits)
	equal(t, "step", explanation.Steps[0], keyturn.ExplainStep{Check: "tier", Result: "eligible", Detail: "premium"})
}

func TestRedeemFetchesTheSecret(t *testing.T) {
	secret, err := serve(t, &sidecar{}).open(t, keyturn.Options{}).Redeem(t.Context(), keyturn.NewSealedHandle(handleText))
	require(t, err)
	equal(t, "secret", secret.Reveal(), secretText)
}

// ------------------------------------------------------------------------------------------------------- retries

func unavailable(reason string, details ...*errdetails.RetryInfo) error {
	if reason == "" {
		return status.Error(codes.Unavailable, "connection refused")
	}
	if len(details) == 1 {
		return fault(codes.Unavailable, reason, details[0])
	}
	return fault(codes.Unavailable, reason)
}

func TestUnavailableAloneIsTriedAgainWithTheSameRequest(t *testing.T) {
	store := unavailable("STORE_UNAVAILABLE")
	s := serve(t, &sidecar{
		onDecide:  scripted[keyturnv1.DecideRequest](ticketAnswer, store, store, store, store),
		onRecord:  scripted[keyturnv1.RecordRequest](recordAnswer, store),
		onExplain: scripted[keyturnv1.ExplainRequest](func() *keyturnv1.ExplainResponse { return &keyturnv1.ExplainResponse{} }, store),
	})
	client := s.open(t, keyturn.Options{})
	_, err := client.Decide(t.Context(), request())
	require(t, err)
	_, err = client.Record(t.Context(), ticketRecord())
	require(t, err)
	_, err = client.Explain(t.Context(), request())
	require(t, err)
	sent := requests[*keyturnv1.DecideRequest](s)
	equal(t, "attempts to decide", len(sent), 5)
	for _, each := range sent {
		equal(t, "the request id", each.GetRequestId(), sent[0].GetRequestId())
	}
	equal(t, "attempts to record", len(s.records()), 2)
	equal(t, "attempts to explain", len(requests[*keyturnv1.ExplainRequest](s)), 2)
}

func TestThereAreFiveAttemptsAtMost(t *testing.T) {
	store := unavailable("STORE_UNAVAILABLE")
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, store, store, store, store, store)})
	_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
	equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), true)
	equal(t, "attempts", len(s.asked), 5)
}

func TestNothingElseIsTriedAgain(t *testing.T) {
	for _, code := range []codes.Code{
		codes.DeadlineExceeded, codes.ResourceExhausted, codes.Internal, codes.Unknown, codes.Aborted, codes.NotFound, codes.Canceled,
	} {
		s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, fault(code, "X"))})
		_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
		made, ok := errors.AsType[*keyturn.Error](err)
		if !ok || made.Code != code {
			t.Errorf("%v: got %v", code, err)
		}
		equal(t, code.String(), len(s.asked), 1)
	}
}

func TestACallThatTheSidecarDroppedAsItEndedIsTriedAgain(t *testing.T) {
	dropped := status.Error(codes.Canceled, "")
	s := serve(t, &sidecar{
		onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, dropped),
		onRecord: scripted[keyturnv1.RecordRequest](recordAnswer, dropped),
	})
	client := s.open(t, keyturn.Options{})
	_, err := client.Decide(t.Context(), request())
	require(t, err)
	_, err = client.Record(t.Context(), ticketRecord())
	require(t, err)
	equal(t, "attempts to decide", len(requests[*keyturnv1.DecideRequest](s)), 2)
	equal(t, "attempts to record", len(s.records()), 2)
}

func TestRedeemIsNeverTriedAgain(t *testing.T) {
	s := serve(t, &sidecar{onRedeem: scripted[keyturnv1.RedeemRequest](func() *keyturnv1.RedeemResponse { return nil }, unavailable("STORE_UNAVAILABLE"))})
	_, err := s.open(t, keyturn.Options{}).Redeem(t.Context(), keyturn.NewSealedHandle(handleText))
	equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), true)
	equal(t, "attempts", len(s.asked), 1)
}

func TestAWaitThatDoesNotFitInTheDeadlineIsNotBegun(t *testing.T) {
	asks := unavailable("STORE_UNAVAILABLE", &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Hour)})
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, asks)})
	_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request()) // an hour would be noticed
	made, _ := errors.AsType[*keyturn.Error](err)
	equal(t, "the wait asked for", made.RetryAfter, time.Hour)
	equal(t, "attempts", len(s.asked), 1)
}

func TestTheWaitThatTheSidecarAsksForIsWaited(t *testing.T) {
	asks := unavailable("STORE_UNAVAILABLE", &errdetails.RetryInfo{RetryDelay: durationpb.New(50 * time.Millisecond)})
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, asks)})
	began := time.Now()
	_, err := s.open(t, keyturn.Options{}).Decide(t.Context(), request())
	require(t, err)
	if took := time.Since(began); took < 50*time.Millisecond {
		t.Errorf("it took %v", took)
	}
}

func TestTheDeadlineCoversAllOfACall(t *testing.T) {
	s := serve(t, &sidecar{onDecide: func(ctx context.Context, _ *keyturnv1.DecideRequest) (*keyturnv1.DecideResponse, error) {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}})
	short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	byOption, byContext, byCall := s.open(t, keyturn.Options{Timeout: 30 * time.Millisecond}), s.open(t, keyturn.Options{}), s.open(t, keyturn.Options{})
	_, first := byOption.Decide(t.Context(), request())
	_, second := byContext.Decide(short, request())
	_, third := byCall.Decide(t.Context(), request(), keyturn.WithTimeout(30*time.Millisecond))
	for i, err := range []error{first, second, third} {
		if !errors.Is(err, keyturn.ErrDeadlineExceeded) || !errors.Is(err, keyturn.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%d: got %v, want ErrDeadlineExceeded", i, err)
		}
	}
}

func TestASidecarThatIsDownCostsOneAttempt(t *testing.T) {
	gone := unavailable("")
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer,
		gone, gone, gone, // a call with all its attempts: now it is down
		gone,                              // one attempt
		gone,                              // one attempt
		unavailable("STORE_UNAVAILABLE"),  // somebody is there again, and is asked again
		nil,                               // answered
		gone, unavailable("X"), gone, nil, // all the attempts again, had it needed them
	)})
	client := s.open(t, keyturn.Options{Retries: keyturn.Retries{Attempts: 3}})
	for i, want := range []int{3, 4, 5, 7, 10} {
		_, err := client.Decide(t.Context(), request())
		equal(t, "attempts so far", len(requests[*keyturnv1.DecideRequest](s)), want)
		equal(t, "it failed", err != nil, i != 3)
	}
	_, err := client.Decide(t.Context(), request())
	require(t, err)
}

func TestAStoreThatIsDownIsNoSidecarThatIsDown(t *testing.T) {
	store, gone := unavailable("STORE_UNAVAILABLE"), unavailable("")
	s := serve(t, &sidecar{onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, gone, store, gone)})
	client := s.open(t, keyturn.Options{Retries: keyturn.Retries{Attempts: 2}})
	_, err := client.Decide(t.Context(), request())
	equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), true)
	_, err = client.Decide(t.Context(), request())
	require(t, err)
	equal(t, "attempts", len(s.asked), 4)
}

func TestARedeemThatFindsNobodyTakesNoAttemptsFromOthers(t *testing.T) {
	gone := unavailable("")
	s := serve(t, &sidecar{
		onRedeem: scripted[keyturnv1.RedeemRequest](func() *keyturnv1.RedeemResponse { return nil }, gone),
		onDecide: scripted[keyturnv1.DecideRequest](ticketAnswer, gone),
	})
	client := s.open(t, keyturn.Options{})
	_, err := client.Redeem(t.Context(), keyturn.NewSealedHandle(handleText))
	equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), true)
	_, err = client.Decide(t.Context(), request())
	require(t, err)
}

// ------------------------------------------------------------------------------------------------------ when down

func TestWhenDownSaysWhetherARequestGoesAheadUnmetered(t *testing.T) {
	pass, asked, own := true, 0, errors.New("my own")
	var answer error
	store, late := unavailable("STORE_UNAVAILABLE"), fault(codes.DeadlineExceeded, "LATE")
	s := serve(t, &sidecar{
		onDecide:      scripted[keyturnv1.DecideRequest](denialAnswer, store, late, store, store, fault(codes.Internal, "INTERNAL")),
		onBatchDecide: scripted[keyturnv1.BatchDecideRequest](func() *keyturnv1.BatchDecideResponse { return nil }, store),
	})
	client := s.open(t, keyturn.Options{
		Retries: keyturn.Retries{Attempts: 1},
		WhenDown: func(_ context.Context, request keyturn.DecideRequest, fault *keyturn.Error) (bool, error) {
			asked++
			equal(t, "the request", request.UserID, "u1")
			equal(t, "the fault", errors.Is(fault, keyturn.ErrUnavailable), true)
			return pass, answer
		},
	})
	for range 2 { // UNAVAILABLE, DEADLINE_EXCEEDED
		decision, err := client.Decide(t.Context(), request())
		require(t, err)
		equal(t, "unmetered", decision.Unmetered && decision.Allowed(), true)
		equal(t, "has a route", decision.Key != nil || decision.Ticket != nil || decision.Denial != nil, false)
	}
	pass = false
	_, err := client.Decide(t.Context(), request())
	equal(t, "the fault goes on", errors.Is(err, keyturn.ErrUnavailable), true)
	answer = own
	_, err = client.Decide(t.Context(), request())
	equal(t, "its own error goes on", errors.Is(err, own), true)
	equal(t, "asked", asked, 4)

	_, err = client.Decide(t.Context(), request()) // INTERNAL
	equal(t, "another fault", errors.Is(err, keyturn.ErrInternal), true)
	_, err = client.Decide(t.Context(), request()) // a denial
	require(t, err)
	_, err = client.DecideMany(t.Context(), []keyturn.DecideRequest{request()})
	equal(t, "many", errors.Is(err, keyturn.ErrUnavailable), true)
	equal(t, "asked", asked, 4)
}

// --------------------------------------------------------------------------------------------------- cancellation

// held is a script that tells when a request came, and answers it when it is released.
func held[Request, Response any](answer func() *Response) (script func(context.Context, *Request) (*Response, error), came, release chan struct{}) {
	came, release = make(chan struct{}, 100), make(chan struct{})
	return func(context.Context, *Request) (*Response, error) {
		came <- struct{}{}
		<-release
		return answer(), nil
	}, came, release
}

func TestACanceledDecisionLeavesNoHoldBehind(t *testing.T) {
	script, came, release := held[keyturnv1.DecideRequest](ticketAnswer)
	s := serve(t, &sidecar{onDecide: script})
	client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-came; cancel() }()
	_, err := client.Decide(ctx, request())
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	if _, ok := errors.AsType[*keyturn.Error](err); ok {
		t.Error("the cancellation is a fault")
	}
	go close(release)
	equal(t, "left", len(client.Close()), 0) // waits for it
	records := s.records()
	equal(t, "records", len(records), 1)
	equal(t, "outcome", records[0].GetOutcome(), keyturnv1.Outcome_OUTCOME_NEVER_SENT)
	equal(t, "ticket", records[0].GetCreditTicket(), ticketText)
}

func TestACanceledDecisionWithAnIDOfTheCallersIsExpectedAgain(t *testing.T) {
	script, came, release := held[keyturnv1.DecideRequest](ticketAnswer)
	s := serve(t, &sidecar{onDecide: script})
	client := s.open(t, keyturn.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-came; cancel() }()
	asked := request()
	asked.RequestID = "mine"
	_, err := client.Decide(ctx, asked)
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	close(release)
	client.Close()
	equal(t, "records", len(s.records()), 0)
}

func TestACallThatItsCallerCanceledIsNotTriedAgain(t *testing.T) {
	for _, most := range []int{1, 5} { // also where the last attempt is canceled
		ctx, cancel := context.WithCancel(t.Context())
		s := serve(t, &sidecar{onExplain: func(ctx context.Context, _ *keyturnv1.ExplainRequest) (*keyturnv1.ExplainResponse, error) {
			cancel()
			<-ctx.Done()
			return nil, status.FromContextError(ctx.Err()).Err()
		}})
		_, err := s.open(t, keyturn.Options{Retries: keyturn.Retries{Attempts: most}}).Explain(ctx, request())
		equal(t, "canceled", errors.Is(err, context.Canceled), true)
		equal(t, "unavailable", errors.Is(err, keyturn.ErrUnavailable), false)
		equal(t, "attempts", len(requests[*keyturnv1.ExplainRequest](s)), 1)
	}
}

func TestADecisionThatWasCanceledBeforeIsNotSent(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := client.Decide(ctx, request())
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	client.Close()
	equal(t, "sent", len(s.asked), 0)
}

func TestACanceledRecordIsCarriedOnInTheBackground(t *testing.T) {
	script, came, release := held[keyturnv1.RecordRequest](recordAnswer)
	s := serve(t, &sidecar{onRecord: script})
	defer close(release)
	client := s.open(t, keyturn.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-came; cancel() }()
	_, err := client.Record(ctx, ticketRecord())
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	_, err = client.RecordMany(ctx, []keyturn.RecordRequest{ticketRecord(), ticketRecord()})
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
	require(t, client.Flush(t.Context()))
	batched := 0
	for _, batch := range requests[*keyturnv1.BatchRecordRequest](s) {
		batched += len(batch.GetRequests())
	}
	equal(t, "records in the background", batched, 3)
}

func TestACallerThatGoesAwayWhileItWaitsIsLetGo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	asks := unavailable("STORE_UNAVAILABLE", &errdetails.RetryInfo{RetryDelay: durationpb.New(10 * time.Second)})
	s := serve(t, &sidecar{onRecord: scripted[keyturnv1.RecordRequest](recordAnswer, asks)})
	client := s.open(t, keyturn.Options{})
	go func() {
		for len(s.records()) == 0 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	_, err := client.Record(ctx, ticketRecord())
	equal(t, "canceled", errors.Is(err, context.Canceled), true)
}

// ---------------------------------------------------------------------------------------------------------- close

func TestAClosedClientRefusesEveryCall(t *testing.T) {
	s := serve(t, &sidecar{})
	client, ctx := s.open(t, keyturn.Options{}), t.Context()
	equal(t, "left", len(client.Close()), 0)
	equal(t, "left again", len(client.Close()), 0)
	_, decide := client.Decide(ctx, request())
	_, decideMany := client.DecideMany(ctx, []keyturn.DecideRequest{request()})
	_, record := client.Record(ctx, ticketRecord())
	_, recordMany := client.RecordMany(ctx, []keyturn.RecordRequest{ticketRecord()})
	_, redeem := client.Redeem(ctx, keyturn.NewSealedHandle(handleText))
	_, explain := client.Explain(ctx, request())
	_, call := client.Request(ctx, request())
	for i, err := range []error{
		decide, decideMany, record, recordMany, redeem, explain, call, client.RecordLater(ticketRecord()), client.Flush(ctx),
	} {
		if !errors.Is(err, keyturn.ErrClosed) {
			t.Errorf("%d: got %v, want ErrClosed", i, err)
		}
	}
	equal(t, "sent", len(s.asked), 0)
}

func TestCallsThatRunWhenTheClientIsClosedEndAsClosed(t *testing.T) {
	script, came, release := held[keyturnv1.DecideRequest](ticketAnswer)
	s := serve(t, &sidecar{onDecide: script})
	defer close(release)
	client := s.open(t, keyturn.Options{})
	go func() { <-came; client.Close() }()
	_, err := client.Decide(t.Context(), request())
	equal(t, "closed", errors.Is(err, keyturn.ErrClosed), true)
}

func TestAClientIsSharedByGoroutines(t *testing.T) {
	s := serve(t, &sidecar{})
	client := s.open(t, keyturn.Options{CloseTimeout: 20 * time.Second})
	var failed atomic.Int32
	done := make(chan struct{})
	for range 20 {
		go func() {
			defer func() { done <- struct{}{} }()
			for range 10 {
				call, err := client.Request(t.Context(), request())
				if err != nil || call.Sending() != nil {
					failed.Add(1)
					continue
				}
				call.Close()
			}
		}()
	}
	for range 20 {
		<-done
	}
	client.Close()
	equal(t, "failures", failed.Load(), 0)
	equal(t, "records", len(s.records()), 200)
}
